"""A guarded forwarder: forwards only what the owner of the publisher's key may publish.

Messages are inspected, not copied. Subscriptions go the other way unchanged.
"""

from __future__ import annotations

import threading
import time

import zmq

from ami_controller.doorkeeper import Security
from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, SocketOptions, Waker, make_socket
from ami_shared.errors import ConfigurationError, WireError
from ami_shared.links import LinkWatch
from ami_shared.receiving import waiting

POLL_MS = 200
MESSAGES_AT_ONCE = 64
REOPENING_S = 5.0


class GuardedForwarder(threading.Thread):
    """Forwards messages that the authority allows from publishers to subscribers, and subscriptions the other way."""

    def __init__(
        self,
        name: str,
        context: zmq.Context[zmq.Socket[bytes]],
        address: HubAddress,
        ports: tuple[Port, Port],
        options: SocketOptions,
        security: Security,
    ) -> None:
        """Bind both ends.

        Args:
            name: of the thread.
            context: ZeroMQ context, of the doorkeeper too.
            address: the address to bind.
            ports: the publishers' port and the subscribers' port.
            options: of both sockets.
            security: the hub's keys.

        Raises:
            ConfigurationError: a port is taken.
        """
        super().__init__(name=name, daemon=True)
        self._context, self._address, self._options, self._security = context, address, options, security
        self._ports = ports
        self.links = (LinkWatch(), LinkWatch())
        self._ending, self._reopening = threading.Event(), threading.Event()
        self._waker = Waker()
        self._in, self._out = self._open()

    def _open(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        opened: list[zmq.Socket[bytes]] = []
        try:
            for port, kind, watch in zip(self._ports, (zmq.XSUB, zmq.XPUB), self.links, strict=True):
                bind, door = self._address.endpoint(port), self._security.door(port)
                opened.append(
                    make_socket(self._context, kind, bind=bind, options=self._options, watch=watch, security=door)
                )
        except ConfigurationError:
            for watch, socket in zip(self.links, opened, strict=False):
                watch.close()
                socket.close()
            raise
        publishers, subscribers = opened
        return publishers, subscribers

    def reopen(self) -> None:
        """Soon cut every connection: all peers reconnect, except those who may no longer connect."""
        self._reopening.set()
        self._waker.wake()

    def drain(self) -> None:
        """Do nothing: the thread itself takes in the events of the connections, since it may reopen the ports."""

    def close(self) -> None:
        """End the thread and free the ports."""
        self._ending.set()
        self._waker.wake()
        if self.is_alive():
            self.join(timeout=limits.CLOSING)
        self._close_sockets()
        self._waker.close()

    def run(self) -> None:
        while not self._ending.is_set():
            if self._reopening.is_set():
                self._reopen()
            poller = zmq.Poller()
            for source in (self._in, self._out, self._waker.fileno()):
                poller.register(source, zmq.POLLIN)
            while not (self._ending.is_set() or self._reopening.is_set()):
                ready = dict(poller.poll(POLL_MS))
                self._waker.clear()
                for watch in self.links:
                    watch.drain()
                if self._out in ready:
                    self._pass_subscriptions()
                if self._in in ready:
                    self._pass_messages()

    def _pass_messages(self) -> None:
        for frames in waiting(self._in, MESSAGES_AT_ONCE):
            public = user_of(frames)
            try:
                message = wire.decode([frame.buffer for frame in frames])
                why_not = self._security.authority.why_not_published(public, message)
            except WireError as error:
                why_not = f"malformed: {error}"
            if why_not:
                self._security.refusals.add("messages", why_not, f"key {public.decode()}")
                continue
            self._out.send_multipart(frames, copy=False)

    def _pass_subscriptions(self) -> None:
        for frames in waiting(self._out, MESSAGES_AT_ONCE):
            if len(frames) == 1 and frames[0].bytes[:1] in (b"\0", b"\1"):
                self._in.send(frames[0])
            else:
                self._security.refusals.add("messages", "a subscriber sends messages", f"port {self._ports[1].name}")

    def _reopen(self) -> None:
        """Bind the ports again; they are not free immediately after their sockets are closed."""
        self._reopening.clear()
        self._close_sockets()
        deadline = time.monotonic() + REOPENING_S
        while not self._ending.is_set():
            try:
                self._in, self._out = self._open()
                return
            except ConfigurationError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _close_sockets(self) -> None:
        for watch, socket in zip(self.links, (self._in, self._out), strict=True):
            watch.close()
            socket.close(linger=0)


def user_of(frames: list[zmq.Frame]) -> bytes:
    """Return the proved key of a message's sender, which libzmq has from the doorkeeper."""
    return str(frames[0].get("User-Id")).encode()
