"""The router: the one thread that owns the control socket and feeds the coordinator."""

from __future__ import annotations

import logging
import time

import zmq

from ami_controller.answers import Outgoing
from ami_controller.coordinator import Coordinator
from ami_shared import wire
from ami_shared.bus import HubAddress, Port, Waker, make_socket
from ami_shared.errors import WireError
from ami_shared.links import LinkWatch
from ami_shared.receiving import Malformed

log = logging.getLogger(__name__)

TICK_S = 0.1


class Router:
    """Receives control messages, has the coordinator decide, and sends its answers."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: HubAddress) -> None:
        """Bind the control port; raise ConfigurationError where it is taken."""
        self.links = LinkWatch()
        self._socket = make_socket(context, zmq.ROUTER, bind=address.endpoint(Port.CONTROL), watch=self.links)
        self._waker = Waker()
        self.malformed = Malformed(log, "message")

    def wake(self) -> None:
        """Let the loop look at its conditions at once."""
        self._waker.wake()

    def serve_once(self, coordinator: Coordinator) -> None:
        """Wait for messages for at most one tick, and handle all that came."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fileno(), zmq.POLLIN)
        poller.poll(int(TICK_S * 1000))
        self._waker.clear()
        self._receive_all(coordinator)
        self._send(coordinator.passed(time.monotonic()), coordinator)
        self.links.drain()

    def _receive_all(self, coordinator: Coordinator) -> None:
        for _ in range(1_000):
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = wire.decode(frames)
                self._send(coordinator.handle(peer, message, time.monotonic()), coordinator)
            except WireError as error:
                self.malformed.dropped(error, repr(peer))

    def _send(self, outgoing: Outgoing, coordinator: Coordinator) -> None:
        for peer, message in outgoing:
            try:
                self._socket.send_multipart([peer, *wire.encode(message)], zmq.NOBLOCK)
            except zmq.Again:
                log.debug("queue to %r full, %s dropped", peer, message.kind)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                coordinator.unreachable(peer, time.monotonic())

    def statistics(self) -> dict[str, int]:
        """Return counters for the status."""
        return {"wire_errors": self.malformed.count}

    def close(self) -> None:
        """Free the port."""
        self.links.close()
        self._socket.close(linger=300)
        self._waker.close()
