"""Bodies of the same host: their records are copied right out of their memory, and their bytes need not be sent.

At first everything is listened to. As soon as a body's places lead to memory within reach, its bytes are not asked for
any more, but only those of bodies that are out of reach. Memory lives as long as anybody holds it: what belongs to a
body that has fallen silent is let go.
"""

from __future__ import annotations

from collections.abc import Container

import zmq

from ami_shared import limits
from ami_shared.experience import Places
from ami_shared.records import TOPIC
from ami_shared.shared_ring import RingReader


class Neighbours:
    """Which bodies' memory is within reach. It belongs to the socket's thread."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        """Args:
        socket: SUB, of the experience stream; it is not yet subscribed to any body's records.
        """
        self._socket = socket
        self._rings: dict[str, tuple[bytes, RingReader]] = {}
        self._far: set[str] = set()
        self._heard_at: dict[str, float] = {}
        self._asked_for: set[bytes] = set()
        self._ask()

    def __contains__(self, body: str) -> bool:
        """Tell whether a body's memory is within reach."""
        return body in self._rings

    def heard_of(self, body: str, now: float) -> None:
        """A body is there; if its memory is not within reach its bytes are asked for."""
        self._heard_at[body] = now
        if body not in self._rings and body not in self._far:
            self._far.add(body)
            self._ask()

    def reach(self, places: Places) -> RingReader | None:
        """Return the memory that the places of a body heard of lead to, if it is within reach."""
        body, token = places.body, places.memory.token
        if body in self._rings and self._rings[body][0] == token:
            return self._rings[body][1]
        ring = RingReader.open(places.memory)
        if ring:
            self._far.discard(body)
            self._rings[body] = (token, ring)
        else:
            self._rings.pop(body, None)
            self._far.add(body)
        self._ask()
        return ring

    def let_go(self, now: float, but: Container[str] = ()) -> None:
        """Let go of the memory of bodies that have been silent for long, except those in `but`."""
        silent = {body for body in self._rings if now - self._heard_at[body] > limits.SILENT_BODY and body not in but}
        for body in silent:
            del self._rings[body]
        if silent:
            self._far |= silent
            self._ask()

    def _ask(self) -> None:
        """Subscribe to the records of bodies that are out of reach; to all, while none is known that is not."""
        wanted = {TOPIC + body.encode() for body in self._far} if self._rings else {TOPIC}
        for topic in wanted - self._asked_for:
            self._socket.subscribe(topic)
        for topic in self._asked_for - wanted:
            self._socket.unsubscribe(topic)
        self._asked_for = wanted
