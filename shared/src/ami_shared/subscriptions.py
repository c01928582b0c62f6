"""What the peers of an XPUB socket have subscribed to, so that no message is made without a subscriber."""

from __future__ import annotations

from collections.abc import Collection

import zmq

from ami_shared.receiving import waiting

AT_ONCE = 2_000


class Subscriptions:
    """The topic prefixes that an XPUB's peers have subscribed to. It belongs to the socket's thread.

    However many subscriptions peers send, only those to the socket's own topics are remembered, and a bounded number is
    read at once.
    """

    def __init__(self, socket: zmq.Socket[bytes], topics: Collection[bytes]) -> None:
        """Watch a socket that has just been made.

        Args:
            socket: XPUB, without a peer so far.
            topics: those that want() will be asked about.
        """
        self._socket, self._topics = socket, topics
        self._prefixes: set[bytes] = set()

    def want(self, topic: bytes) -> bool:
        """Return whether anybody is subscribed to a topic."""
        self.hear()
        return any(topic.startswith(prefix) for prefix in self._prefixes)

    def hear(self) -> None:
        """Read the peers' subscriptions. Call it at intervals: unread ones queue up without bound."""
        for first, *_ in waiting(self._socket, AT_ONCE):
            kind, prefix = first.bytes[:1], first.bytes[1:]  # \x01 subscribes to the prefix, \x00 unsubscribes
            if kind == b"\x00":
                self._prefixes.discard(prefix)
            elif kind == b"\x01" and any(topic.startswith(prefix) for topic in self._topics):
                self._prefixes.add(prefix)
