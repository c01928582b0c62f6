"""What the far ends of an XPUB socket have asked for, so that nobody makes a message that nobody wants."""

from __future__ import annotations

import zmq


class Subscriptions:
    """The topic prefixes that an XPUB's peers have subscribed to. It belongs to the socket's thread."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._prefixes: set[bytes] = set()

    def want(self, topic: bytes) -> bool:
        """Tell whether anybody has asked for messages of a topic by now."""
        while self._socket.poll(0):
            match (wish := self._socket.recv())[:1]:  # \x01 and the prefix; \x00 takes it back
                case b"\x01":
                    self._prefixes.add(wish[1:])
                case b"\x00":
                    self._prefixes.discard(wish[1:])
        return any(topic.startswith(prefix) for prefix in self._prefixes)
