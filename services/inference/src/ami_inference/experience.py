"""The experience stream's sending end: a thread that batches records by count and age, publishes and retains them.

The loop only appends to a queue, so that the network cannot block it. A trainer that misses records requests them, and
gets them on a topic of its own, a bounded piece at a time, alongside the live stream.

Records are stacked directly into a ring of bytes. Trainers on the same host are told where they are, and copy them
themselves; the bytes are sent only if a trainer subscribes to them that cannot reach the ring. Large ones are sent from
where they are. If the network is so slow that the ring would overwrite them, new records get memory of their own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import zmq

from ami_inference.batching import Batcher
from ami_inference.retained import Retained, SentBatch
from ami_shared import limits, wire
from ami_shared.bus import EXPERIENCE, HubAddress, Port, dial
from ami_shared.checkpoints import Cut
from ami_shared.clock import Every
from ami_shared.errors import WireError
from ami_shared.experience import Extent, Fetch, Fetched, Place, Places, Range, fetched_topic, places_topic
from ami_shared.links import LinkWatch
from ami_shared.records import Record, RecordBatch, topic
from ami_shared.sending import send_in_place
from ami_shared.shared_ring import Ring
from ami_shared.subscriptions import Subscriptions
from ami_shared.wire import Array, Message

log = logging.getLogger(__name__)


class ExperienceSender(threading.Thread):
    """Publishes a body's records."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        body: str,
        incarnation: str,
        retained_bytes: int,
    ) -> None:
        """Connect to the hub; records flow once the thread is started.

        Args:
            context: ZeroMQ context of the socket.
            hub: the hub to connect to.
            body: name of the body.
            incarnation: of the body.
            retained_bytes: how much of what was sent can be fetched again.
        """
        super().__init__(name="experience", daemon=True)
        self._body, self._incarnation = body, incarnation
        self._queue: deque[Record | Cut] = deque(maxlen=limits.UNSENT_RECORDS)
        self._ring = Ring(retained_bytes)
        batch_bytes = min(limits.BATCH_BYTES, self._ring.largest // 4)  # a batch ends with the record beyond this
        self._batcher: Batcher[Record] = Batcher(limits.BATCH_RECORDS, limits.BATCH_AGE, batch_bytes, _nbytes)
        self._next_sequence = 0
        self._cut: tuple[Cut, int] | None = None
        self._cut_old_at = 0.0
        self._wake = threading.Event()
        self._ending = self._flushing = False
        self._idle = True  # no batch has been begun: the next record must wake the thread, to time its age
        self._knows_extent = True
        self._retained = Retained(retained_bytes)
        self._untold: list[Place] = []
        self._sending: list[tuple[int, zmq.MessageTracker]] = []  # from the ring; its position
        self._asked: deque[Fetch] = deque(maxlen=limits.UNANSWERED_FETCHES)
        self._extent_due = Every(limits.EXTENT_INTERVAL, first_after_s=0.0)
        self.link = LinkWatch()
        self._socket = dial(context, zmq.XPUB, hub, Port.EXPERIENCE_IN, EXPERIENCE, self.link)
        self._topic, self._places_topic = topic(body), places_topic(body)
        self._subscriptions = Subscriptions(self._socket, [self._topic, self._places_topic])
        self.published = self.overflowed = self.unsendable = self.resent = self.wishes_dropped = 0
        self.bytes_sent = 0

    def put(self, record: Record) -> None:
        """Queue a record to be sent; never blocks."""
        self.overflowed += len(self._queue) == self._queue.maxlen
        self._queue.append(record)
        if (self._idle or len(self._queue) >= limits.BATCH_RECORDS) and not self._wake.is_set():
            self._wake.set()

    def cut(self, cut: Cut) -> None:
        """Mark a cut of the whole system between the records so far and the next ones."""
        self.overflowed += len(self._queue) == self._queue.maxlen
        self._queue.append(cut)
        self._wake.set()

    def go_on_as(self, incarnation: str, next_sequence: int) -> None:
        """Continue an earlier process's stream; call it before put(). The first record tells what that retained."""
        self._incarnation, self._next_sequence, self._knows_extent = incarnation, next_sequence, False

    def flush(self) -> None:
        """Send everything queued so far at once."""
        self._flushing = True
        self._wake.set()

    def fetch(self, message: Message) -> None:
        """Soon answer a trainer's request for records; nothing of a former incarnation. Thread-safe.

        Raises:
            WireError: the message is not a Fetch.
        """
        wish = Fetch.from_message(message)
        if (wish.body, wish.incarnation) == (self._body, self._incarnation):
            self.wishes_dropped += len(self._asked) == self._asked.maxlen
            self._asked.append(wish)
            self._wake.set()

    def close(self) -> None:
        """Send what is queued and end the thread."""
        self._ending = True
        self._wake.set()
        if self.is_alive():
            self.join(timeout=limits.CLOSING)
        elif not self._socket.closed:  # the thread was never started
            self._hang_up()

    def run(self) -> None:
        while not self._ending:
            self._wake.wait(self._patience_s(time.monotonic()))
            self._wake.clear()
            self._drain()
            self._serve_one()
            if (self._knows_extent or self._cut) and self._extent_due.due(time.monotonic()):
                self._tell_extent()
        self._drain()
        if last := self._batcher.flush():
            self._publish(last)
        self._tell_new_places()
        if self._knows_extent:
            self._tell_extent()  # so that trainers that miss the last records learn of them
        self._hang_up()

    def _hang_up(self) -> None:
        self.link.close()
        self._socket.close(linger=500)

    def _patience_s(self, now: float) -> float:
        due_in = 0.0 if self._asked else self._batcher.due_in(now)
        return limits.EXTENT_INTERVAL if due_in is None else min(limits.EXTENT_INTERVAL, due_in)

    def _drain(self) -> None:
        now = time.monotonic()
        flushing, self._flushing = self._flushing, False
        self._idle = True
        for _ in range(len(self._queue)):  # new records wait until trainers have been answered
            record = self._queue.popleft()
            if isinstance(record, Cut):
                self._mark(record)
                continue
            if record.sequence != self._next_sequence and (batch := self._batcher.flush()):
                self._publish(batch)  # the queue has overflowed: a batch holds consecutive records only
            self._next_sequence = record.sequence + 1
            try:
                batch = self._batcher.add(record, now)
            except WireError as error:
                if batch := self._batcher.flush():  # the next record does not follow directly
                    self._publish(batch)
                self._drop(record, error)
                continue
            if batch:
                self._publish(batch)
        if batch := self._batcher.flush() if flushing else self._batcher.take_aged(now):
            self._publish(batch)
        self._tell_new_places()
        self._idle = self._batcher.due_in(now) is None

    def _mark(self, cut: Cut) -> None:
        if batch := self._batcher.flush():
            self._publish(batch)
        self._tell_new_places()
        self._cut, self._cut_old_at = (cut, self._next_sequence), time.monotonic() + limits.CUT_PATIENCE
        self._tell_extent()

    def _publish(self, records: list[Record]) -> None:
        """Send consecutive records: together, or one by one if they differ in form."""
        try:
            self._publish_together(records)
        except (WireError, ValueError, TypeError, KeyError, OverflowError) as error:
            if len(records) == 1:
                self._drop(records[0], error)
                return
            for record in records:
                self._publish([record])

    def _drop(self, record: Record, why: Exception) -> None:
        """Drop a record that cannot be sent: a defect of the agent must not end the body."""
        self.published, self._knows_extent = record.sequence + 1, True
        self._retained.skip_to(self.published, self._ring.gone)  # room may have been reserved for it
        self.unsendable += 1
        if self.unsendable == 1:
            log.error("record %d of %s cannot be sent: %s", record.sequence, self._body, why)

    def _publish_together(self, records: list[Record]) -> None:
        first_after_cut = self._cut is not None and records[0].sequence == self._cut[1]
        cut = self._cut[0] if self._cut and first_after_cut else None
        position, may_write = self._ring.end, self._may_write()
        fits = len(records) * _nbytes(records[0]) <= self._ring.largest // 2
        room = self._room if may_write and fits else np.empty
        _, *frames = wire.encode(RecordBatch.stack(self._body, self._incarnation, records, cut, room).to_message())
        if (largest := max(map(len, frames))) > limits.MAX_EXPERIENCE_FRAME_BYTES:  # the hub would cut the link
            raise WireError(f"an array of {largest} bytes, limit {limits.MAX_EXPERIENCE_FRAME_BYTES}")
        batch = self._kept((records[0].sequence, records[-1].sequence + 1), frames, position, may_write)
        self._retained.add(batch, self._ring.gone)
        self.published, self._knows_extent = batch.range[1], True
        if batch.place:
            self._untold.append(batch.place)
            if self._is_much_untold():
                self._tell_new_places()
        if self._subscriptions.want(self._topic):
            self._tell_new_places()  # first, so that neighbours know that they do not need the bytes
            self._send_batch(self._topic, batch)
        if self._ring.reference and not batch.place:
            self._tell_new_places()
            self._tell_extent()  # so that neighbours, which only get places, request it

    def _room(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return the array for a column: in the ring, or outside for a small one, which is sent in the header."""
        small = math.prod(shape) * dtype.itemsize <= wire.SMALL
        return np.empty(shape, dtype) if small else self._ring.array(shape, dtype)

    def _is_much_untold(self) -> bool:
        """Return whether to announce places now: their number is bounded, and they must not be gone soon."""
        waiting_bytes = self._ring.end - self._untold[0].spans[0][0]
        return len(self._untold) == limits.FETCH_BATCHES or waiting_bytes > 4 * self._ring.largest

    def _kept(self, range_: Range, frames: list[bytes | memoryview], position: int, may_write: bool) -> SentBatch:
        """Return a batch with its frames in the ring, if that may be written and has room."""
        if not may_write or sum(map(len, frames)) > self._ring.largest:
            return SentBatch(range_, tuple(frames), position)
        spans = tuple(map(self._ring.keep, frames))
        place = Place(range_, spans) if self._ring.reference else None
        return SentBatch(range_, tuple(map(self._ring.view, spans)), position, place)

    def _may_write(self) -> bool:
        """Return whether another batch in the ring would overwrite nothing that is still being sent from there."""
        self._sending = [sending for sending in self._sending if not sending[1].done]
        return all(self._ring.leaves(position) for position, _ in self._sending)

    def _tell_new_places(self) -> None:
        """Announce all new batches in one message: the cost of a message exceeds that of its content."""
        if self._untold:
            if self._subscriptions.want(self._places_topic):
                self._tell_places(self._untold)
            self._untold = []

    def _tell_places(self, places: list[Place], trainer: str | None = None) -> None:
        while places and self._ring.reference:
            spans = list(accumulate(len(place.spans) for place in places))
            count = max(1, bisect_right(spans, limits.PLACES_SPANS))
            told, places = places[:count], places[count:]
            message = Places(self._body, self._incarnation, self._ring.reference, tuple(told)).to_message(trainer)
            self._send(wire.encode(message))

    def _serve_one(self) -> None:
        """Answer one trainer's request, or a bounded part of it: the trainer requests the rest.

        The more requests are waiting, the less is sent for each: the socket's queue is bounded too.
        """
        if not self._asked:
            return
        wish = self._asked.popleft()
        at_most_bytes = limits.FETCH_BYTES // (1 + len(self._asked))
        answer = self._retained.answer(wish.range, at_most_bytes, limits.FETCH_BATCHES, wish.places)
        if answer.gone:
            self._tell_extent()  # first, so that nobody waits for records that have left the ring
        if wish.places:
            self._tell_places([batch.place for batch in answer.batches if batch.place], wish.trainer)
        for batch in answer.batches:
            if not (wish.places and batch.place):
                self._send_batch(fetched_topic(wish.trainer), batch)
            self.resent += batch.range[1] - batch.range[0]
        ending = Fetched(self._body, self._incarnation, answer.range, answer.gone)
        self._send(wire.encode(ending.to_message(wish.trainer)))

    def _tell_extent(self) -> None:
        """Let trainers notice which records they miss, even if no more are sent."""
        self._subscriptions.hear()
        if self._cut and time.monotonic() > self._cut_old_at:
            self._cut = None
        self._send(wire.encode(Extent(self._body, self._incarnation, self._retained.range, self._cut).to_message()))

    def _send_batch(self, topic: bytes, batch: SentBatch) -> None:
        """Send a batch: large frames from where they are, unless the ring will soon overwrite them."""
        frames = [topic, *batch.frames]
        if not self._ring.is_recent(batch.position):
            self._send(frames)
            return
        trackers = send_in_place(self._socket, frames, limits.SENT_IN_PLACE_BYTES)
        self._sending += ((batch.position, tracker) for tracker in trackers)
        self.bytes_sent += sum(map(len, frames))

    def _send(self, frames: list[bytes | memoryview]) -> None:
        self._socket.send_multipart(frames)
        self.bytes_sent += sum(map(len, frames))

    @property
    def unsent(self) -> int:
        """Number of records that are waiting to be sent."""
        return len(self._queue)

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the stream at this end."""
        return {
            "published": self.published,
            "unsent": self.unsent,
            "overflowed": self.overflowed,
            "unsendable": self.unsendable,
            "resent": self.resent,
            "wishes_dropped": self.wishes_dropped,
            "bytes_sent": self.bytes_sent,
            "retained": self._retained.statistics(),
        }


def _nbytes(record: Record) -> int:
    nbytes = 0
    if not isinstance(record.data, Mapping):
        raise WireError(f"a record's data is a {type(record.data).__name__}, not a map of arrays")
    for name, array in record.data.items():
        if not isinstance(array, np.ndarray):
            raise WireError(f"{name!r:.80} is a {type(array).__name__}, not an array")
        nbytes += array.nbytes
    return nbytes
