"""What the far ends of an XPUB socket have asked for, so that nobody makes a message that nobody wants."""

from __future__ import annotations

from collections.abc import Collection

import zmq

from ami_shared.receiving import waiting

AT_ONCE = 2_000


class Subscriptions:
    """The topic prefixes that an XPUB's peers have subscribed to. It belongs to the socket's thread.

    However many wishes anybody sends, only those are remembered that concern the socket's own topics, and a bounded
    number is read at once.
    """

    def __init__(self, socket: zmq.Socket[bytes], topics: Collection[bytes]) -> None:
        """Args:
        topics: those that want() will be asked about.
        """
        self._socket, self._topics = socket, topics
        self._prefixes: set[bytes] = set()

    def want(self, topic: bytes) -> bool:
        """Tell whether anybody has asked for messages of a topic by now."""
        self.hear()
        return any(topic.startswith(prefix) for prefix in self._prefixes)

    def hear(self) -> None:
        """Read what peers have asked for. Call it now and then: what is not read waits without bound."""
        for first, *_ in waiting(self._socket, AT_ONCE):
            kind, prefix = first.bytes[:1], first.bytes[1:]  # \x01 and the prefix; \x00 takes it back
            if kind == b"\x00":
                self._prefixes.discard(prefix)
            elif kind == b"\x01" and any(topic.startswith(prefix) for topic in self._topics):
                self._prefixes.add(prefix)
