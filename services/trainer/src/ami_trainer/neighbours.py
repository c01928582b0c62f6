"""Bodies on the same host: their records are copied directly from their memory, and need not be sent.

At first a trainer subscribes to everything. As soon as a body's places lead to memory within reach, it unsubscribes
from the body's records, and from the places of bodies that are out of reach. Memory lives as long as any process
holds it: that of a body which no longer announces records in it is released.
"""

from __future__ import annotations

from collections.abc import Container

import zmq

from ami_shared import limits
from ami_shared.experience import PLACES_TOPIC, Places, places_topic
from ami_shared.records import TOPIC
from ami_shared.records import topic as records_topic
from ami_shared.shared_ring import RingReader


class Neighbours:
    """The bodies whose memory is within reach. It belongs to the socket's thread."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        """Start with no body known.

        Args:
            socket: SUB, of the experience stream; it is not yet subscribed to any body's records or places.
        """
        self._socket = socket
        self._rings: dict[str, tuple[bytes, RingReader]] = {}
        self._out_of_reach: dict[str, float] = {}  # bodies whose memory is out of reach, and when that was tried
        self._reached_at: dict[str, float] = {}
        self._heard: set[str] = set()
        self._asked_for: set[bytes] = set()
        self._listening = False

    def listen(self) -> None:
        """Subscribe to records: nothing that could pile up is sent earlier."""
        self._listening = True
        self._ask()

    def __contains__(self, body: str) -> bool:
        """Return whether a body's memory is within reach."""
        return body in self._rings

    def heard_of(self, body: str) -> None:
        """Note a body; unless its memory is within reach, subscribe to its records."""
        if body not in self._heard:
            self._heard.add(body)
            self._ask()

    def forget(self, body: str) -> None:
        """Note that a body is gone for good."""
        self._heard.discard(body)
        for known in (self._rings, self._out_of_reach, self._reached_at):
            known.pop(body, None)
        self._ask()

    def reach(self, places: Places, now: float) -> RingReader | None:
        """Return the memory to which the places of a known body lead, if it is within reach."""
        body, token = places.body, places.memory.token
        self._reached_at[body] = now
        if body in self._rings and self._rings[body][0] == token:
            return self._rings[body][1]
        ring = RingReader.open(places.memory)
        if ring:
            self._out_of_reach.pop(body, None)
            self._rings[body] = (token, ring)
        else:
            self._rings.pop(body, None)
            self._out_of_reach[body] = now
        self._ask()
        return ring

    def let_go(self, now: float, but: Container[str] = ()) -> None:
        """Release the memory of bodies that have announced nothing in it for long, except those in `but`.

        Memory that has been out of reach for long is tried again: the body may have moved to this host.
        """
        silent = {body for body in self._rings if now - self._reached_at[body] > limits.SILENT_BODY and body not in but}
        for body in silent:
            del self._rings[body]
        again = {body for body, tried in self._out_of_reach.items() if now - tried > limits.REACH_AGAIN}
        for body in again:
            del self._out_of_reach[body]
        if silent or again:
            self._ask()

    def _ask(self) -> None:
        """Subscribe to the records of bodies that are not neighbours, and to the places of those that may be.

        While there is no body to exclude, subscribe to all.
        """
        if not self._listening:
            return
        maybe_near = self._heard - self._out_of_reach.keys()
        far = self._heard - self._rings.keys()
        records = {records_topic(body) for body in far} if self._rings else {TOPIC}
        places = {places_topic(body) for body in maybe_near} if self._out_of_reach else {PLACES_TOPIC}
        wanted = records | places
        for topic in sorted(wanted - self._asked_for):
            self._socket.subscribe(topic)
        for topic in sorted(self._asked_for - wanted):
            self._socket.unsubscribe(topic)
        self._asked_for = wanted
