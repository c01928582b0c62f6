"""The experience stream's last step: a thread that passes on to the trainer's buffer what is in order.

However slow the buffer is, the intake's thread goes on receiving. Records in the memory of a body on the same host are
safe there: they are copied when the buffer is ready.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ami_shared import limits
from ami_shared.checkpoints import Cut
from ami_shared.errors import WireError
from ami_shared.receiving import Malformed
from ami_shared.records import RecordBatch
from ami_shared.shared_ring import RingReader
from ami_trainer.frontier import BodyStream

log = logging.getLogger(__name__)

POLL_S = 0.1


@dataclass(frozen=True)
class Announcement:
    """What a body has announced, and what waits for its turn.

    Attributes:
        take: processes it; may raise WireError. Records in memory are copied.
        ring: the memory that holds the announced records, if any.
        records: their number.
    """

    take: Callable[[], None]
    ring: RingReader | None = None
    records: int = 0


class Feeder(threading.Thread):
    """Passes records on, in order, once, and up to a cut of the whole system.

    Attributes:
        lock: of the streams and announcements, for this thread and the intake's. Never held while a buffer takes
            records, or while records are copied.
        streams: body → its stream.
        consumed: body → its incarnation, and the number after its last record passed on.
        records: number of records passed on.
        cut: the cut at which all bodies' streams stand, if they do: nothing is passed on until pass_cut().
    """

    def __init__(
        self,
        consume: Callable[[RecordBatch, bool], None],
        on_consumed: Callable[[], None],
        on_room: Callable[[], None],
        malformed: Malformed,
    ) -> None:
        """Start without any stream.

        Args:
            consume: takes a batch of new records, and whether it continues the body's last one without a gap;
                raises WireError if the records do not fit. Called in this thread.
            on_consumed: called after `consume`, when `consumed` includes the batch, and when `cut` has been reached.
            on_room: called when records have been passed on: there may be room for more.
            malformed: counts records that do not fit, and malformed ones in memory.
        """
        super().__init__(name="feeder", daemon=True)
        self._consume, self._on_consumed, self._on_room, self._malformed = consume, on_consumed, on_room, malformed
        self.lock = threading.RLock()
        self.streams: dict[str, BodyStream] = {}
        self.consumed: dict[str, tuple[str, int]] = {}
        self.records = 0
        self.cut: Cut | None = None
        self._announced: dict[str, deque[Announcement]] = {}
        self._passed: Cut | None = None
        self._wished: Cut | None = None
        self._standing: dict[str, Cut] = {}  # the cut that each body's stream stands at
        self._standing_since = 0.0
        self._ending = False
        self._news = threading.Event()

    def wake(self) -> None:
        """Tell that something may have become ready."""
        self._news.set()

    def close(self) -> None:
        """End the thread."""
        self._ending = True
        self._news.set()
        if self.is_alive():
            self.join(timeout=limits.CLOSING)

    def run(self) -> None:
        self._standing_since = time.monotonic()
        while not self._ending:
            self._read_on()
            if not self._hand_on():
                self._news.wait(POLL_S)
                self._news.clear()

    def in_turn(self, body: str, announcement: Announcement) -> None:
        """Process an announcement after all earlier ones of its body: at once if none waits. Call it with the lock.

        Those of records in memory always wait, as they are; if too many do, their records are fetched later.
        """
        stream, waiting = self.streams[body], self._announced.setdefault(body, deque())
        if not waiting and not announcement.ring:
            announcement.take()
            return
        rings = {id(other.ring) for other in waiting if other.ring} if announcement.ring else set()
        if len(waiting) < limits.UNREAD_MESSAGES and len(rings | {id(announcement.ring)}) <= limits.UNREAD_RINGS:
            waiting.append(announcement)
            stream.unread += announcement.records
        else:
            stream.counters.postponed += announcement.records

    def has_waiting(self, body: str) -> bool:
        """Return whether announcements of a body wait for their turn."""
        return bool(self._announced.get(body))

    def forget(self, body: str) -> None:
        """Drop all that is known of a body. Call it with the lock."""
        for known in (self.streams, self._announced, self.consumed):
            known.pop(body, None)

    def _read_on(self) -> None:
        """Process waiting announcements, as far as there is room."""
        for body, waiting in list(self._announced.items()):
            while (stream := self.streams.get(body)) and waiting and (stream.has_room or not waiting[0].ring):
                try:
                    waiting[0].take()
                except WireError as error:  # a malformed batch in a body's memory does not affect the others
                    self._malformed.dropped(error)
                with self.lock:
                    stream.unread -= waiting.popleft().records

    def _hand_on(self) -> bool:
        """Pass one batch of each body on to the buffer; return whether there was any.

        While a cut is taken there is none: the buffer stands still, even if bodies publish that are not part of it.
        """
        with self.lock:
            reached = self._look_for_cut(time.monotonic())
            streams = {} if self.cut else dict(self.streams)
            taken = [(body, stream, *of) for body, stream in streams.items() if (of := stream.take())]
        if reached:
            self._on_consumed()
        for body, stream, batch, continues in taken:
            fits = self._fits(batch, continues)
            with self.lock:
                if fits:
                    self.records += len(batch)
                else:
                    stream.refuse(batch)
                if self.streams.get(body) is stream:  # refused records are done with too
                    self.consumed[body] = (batch.incarnation, batch.end)
            self._on_consumed()
        if taken:
            self._on_room()
        return bool(taken)

    def _fits(self, batch: RecordBatch, continues: bool) -> bool:
        try:
            self._consume(batch, continues)
        except WireError as error:
            self._malformed.dropped(error)
            return False
        return True

    def _look_for_cut(self, now: float) -> bool:
        """Check whether all bodies of a cut stand at it; return whether one has been reached."""
        reached = False
        if self._wished and not self.cut:
            self.cut, self._wished, reached = self._wished, None, True
        standing = {body: cut for body, stream in self.streams.items() if (cut := stream.at_cut)}
        for body, cut in standing.items():
            if cut == self._passed:
                self.streams[body].pass_cut()
            elif cut != self.cut and all(standing.get(other) == cut for other in cut.bodies):
                self.cut, reached = cut, True
        if not standing or self.cut or standing != self._standing:
            self._standing, self._standing_since = standing, now
        elif now - self._standing_since > limits.CUT_PATIENCE:
            waited_for = {body for cut in standing.values() for body in cut.bodies} - standing.keys()
            whom = ", ".join(sorted(waited_for)) or "the bodies together"
            log.warning("no cut for a checkpoint came from %s: continuing without", whom)
            self._passed = next(iter(standing.values()))
        return reached

    def wish_cut(self, cut: Cut) -> None:
        """Request a cut that no stream will announce, since no body takes part in it. Thread-safe."""
        if not cut.bodies:
            with self.lock:
                self._wished = cut
            self.wake()

    def pass_cut(self, cut: Cut) -> None:
        """Let records after the cut be passed on; called when it has been taken. Thread-safe."""
        with self.lock:
            self._passed, self.cut = cut, None
        self.wake()
