"""The router: the one thread that owns the control socket and feeds the coordinator."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable

import zmq

from ami_controller.allowance import Allowance
from ami_controller.answers import DENIED, Outgoing, answer
from ami_controller.coordinator import Coordinator
from ami_controller.doorkeeper import Security
from ami_controller.guarded_forwarder import user_of
from ami_controller.key_folder import Peer
from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, Waker, make_socket
from ami_shared.clock import Every
from ami_shared.errors import WireError
from ami_shared.links import LinkWatch
from ami_shared.receiving import Malformed
from ami_shared.wire import Message

log = logging.getLogger(__name__)

TICK_S = 0.1
PASS_S = 0.01  # between two checks of what is due, while messages arrive continuously


class Router:
    """Receives control messages, lets the coordinator decide, and sends its answers."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: HubAddress, security: Security | None = None
    ) -> None:
        """Bind the control port.

        Args:
            context: ZeroMQ context, of the doorkeeper too.
            address: the address to bind.
            security: the hub's keys; None = messages from anyone are accepted.

        Raises:
            ConfigurationError: the port is taken.
        """
        self.links = LinkWatch()
        self._security = security
        self._revoked: deque[Peer] = deque()
        self._allowance = Allowance(limits.CONTROL_RATE, limits.CONTROL_BURST)
        self._socket = make_socket(
            context,
            zmq.ROUTER,
            bind=address.endpoint(Port.CONTROL),
            watch=self.links,
            security=security.door(Port.CONTROL) if security else None,
        )
        self._shut_down_due = False
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        self._pass_due = Every(PASS_S, first_after_s=0.0)
        self.malformed = Malformed(log, "message")
        self._dropped = 0

    def wake(self) -> None:
        """Make the loop check its conditions at once."""
        self._waker.wake()

    def shut_down(self) -> None:
        """Let the coordinator end the whole system, as an operator's command would. Thread-safe."""
        self._shut_down_due = True
        self._waker.wake()

    def cut_off(self, revoked: Iterable[Peer]) -> None:
        """Let the coordinator remove the peers whose keys were revoked. Thread-safe."""
        self._revoked.extend(revoked)
        self._waker.wake()

    def serve_once(self, coordinator: Coordinator) -> None:
        """Wait at most one tick for messages, and handle all that have arrived."""
        for ready, _ in self._poller.poll(int(TICK_S * 1000)):
            if ready is not self._socket:
                self._waker.clear()
        came = self._receive_all(coordinator)
        while self._revoked:
            self._send(coordinator.revoked(self._revoked.popleft().name, time.monotonic()), coordinator)
        if self._shut_down_due:
            self._shut_down_due = False
            self._send(coordinator.shut_down(time.monotonic()), coordinator)
        if self._pass_due.due(now := time.monotonic()) or not came:
            self._send(coordinator.passed(now), coordinator)
            self.links.drain()

    def _receive_all(self, coordinator: Coordinator) -> bool:
        """Handle the messages that have arrived; return whether there were any."""
        for n in range(1_000):
            try:
                received = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return n > 0
            peer = received[0].bytes
            try:
                self._check_allowance(received)
                message = wire.decode([frame.buffer for frame in received[1:]])
                why_not = self._why_not(received, message)
                outgoing = (
                    denial(peer, message, why_not) if why_not else coordinator.handle(peer, message, time.monotonic())
                )
                self._send(outgoing, coordinator)
            except WireError as error:
                self.malformed.dropped(error, repr(peer))
        return True

    def _check_allowance(self, received: list[zmq.Frame]) -> None:
        """Raise WireError if the sender's key has sent too much; before anything of the message is decoded."""
        if self._security and not self._allowance.take(public := user_of(received), time.monotonic()):
            self._security.refusals.add("commands", "more messages than a key may send", f"key {public.decode()}")
            raise WireError("more messages than a key may send")

    def _why_not(self, received: list[zmq.Frame], message: Message) -> str | None:
        """Return why the owner of the sender's key may not send this; None if it may."""
        if self._security is None:
            return None
        public = user_of(received)
        why_not = self._security.authority.why_not_said(public, message)
        if why_not:
            self._security.refusals.add("commands", why_not, f"key {public.decode()}")
        return why_not

    def _send(self, outgoing: Outgoing, coordinator: Coordinator) -> None:
        for peer, message in outgoing:
            try:
                # Without a copy: copying a large snapshot would delay everyone else's heartbeats.
                self._socket.send_multipart([peer, *wire.encode(message)], zmq.NOBLOCK, copy=False)
            except WireError as error:
                self.malformed.dropped(error, f"here to {peer!r}")
            except zmq.Again:
                self._dropped += 1
                log.debug("queue to %r full, %s dropped", peer, message.kind)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                coordinator.unreachable(peer, time.monotonic())

    def statistics(self) -> dict[str, int]:
        """Return counters for the status."""
        return {"wire_errors": self.malformed.count, "answers_dropped": self._dropped}

    def close(self) -> None:
        """Free the port."""
        self.links.close()
        self._socket.close(linger=300)
        self._waker.close()


def denial(peer: bytes, message: Message, why_not: str) -> Outgoing:
    """Return the refusal to a peer that waits for an answer; nothing for other messages."""
    request = message.fields.get("request")
    return [(peer, answer(DENIED, {"request": request, "reason": why_not}))] if type(request) is int else []
