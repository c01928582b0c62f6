"""The experience stream's receiving end: a thread that sorts what arrives, and requests what is missing.

It waits for nobody: another thread passes on to the buffer what is in order (feeding.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import zmq

from ami_shared import experience, limits, wire
from ami_shared.bus import EXPERIENCE, HubAddress, Port, dial
from ami_shared.clock import Clock, SystemClock
from ami_shared.errors import WireError
from ami_shared.experience import EXTENT_TOPIC, Extent, Fetch, Fetched, Place, Places, fetched_topic
from ami_shared.links import LinkWatch
from ami_shared.membership import Identity
from ami_shared.receiving import Malformed, receive_all
from ami_shared.records import MESSAGE_TYPE as RECORDS
from ami_shared.records import RecordBatch
from ami_shared.shared_ring import RingReader
from ami_shared.wire import Message
from ami_trainer.feeding import Announcement, Feeder
from ami_trainer.frontier import BodyStream
from ami_trainer.neighbours import Neighbours

log = logging.getLogger(__name__)

POLL_MS = 100
MESSAGES_AT_ONCE = 64
ANYBODY = ""  # the sender of what cannot be decoded


class Intake(threading.Thread):
    """Receives the experience of all bodies.

    Attributes:
        feeder: passes them on to the buffer.
        newest_versions: body → model → version with which its newest record was made.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        hub: HubAddress,
        identity: Identity,
        consume: Callable[[RecordBatch, bool], None],
        history: int,
        ask: Callable[[Message], None],
        on_consumed: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        """Connect to the hub; records flow once the thread is started.

        Args:
            context: ZeroMQ context of the socket.
            hub: the hub to connect to.
            identity: of the trainer.
            consume: takes a batch of new records, see Feeder. Called in the feeder's thread.
            history: how many records from before this trainer joined are useful.
            ask: sends a message to a body via the controller; never blocks; thread-safe.
            on_consumed: called after `consume`, and at a cut, see Feeder.
            clock: tells the time.
        """
        super().__init__(name="intake", daemon=True)
        self._identity, self._history, self._ask = identity, history, ask
        self._clock = clock or SystemClock()
        self._fetched_topic = fetched_topic(identity.name)
        self._ending = threading.Event()
        self.link = LinkWatch()
        self._socket = dial(context, zmq.SUB, hub, Port.EXPERIENCE_OUT, EXPERIENCE, self.link)
        self._neighbours = Neighbours(self._socket)
        self.newest_versions: dict[str, dict[str, int]] = {}
        self.malformed = Malformed(log, "experience")
        self.feeder = Feeder(consume, on_consumed, self._ask_for_missing, self.malformed)
        self._lock, self.streams = self.feeder.lock, self.feeder.streams
        self._heard_at: dict[str, float] = {}
        self._spoilt: Counter[str] = Counter()  # body → number of malformed parts of requested answers
        self._forgotten: OrderedDict[str, dict[str, Any]] = OrderedDict()

    @property
    def present(self) -> dict[str, tuple[str, int]]:
        """What was consumed of the bodies that are heard; of all, if none is: they may be starting again."""
        now, consumed = time.monotonic(), dict(self.feeder.consumed)
        heard = {body for body in consumed if now - self._heard_at.get(body, now) <= limits.SILENT_BODY}
        return {body: frontier for body, frontier in consumed.items() if body in heard} or consumed

    def close(self) -> None:
        """End both threads."""
        self._ending.set()
        if self.is_alive():
            self.join(timeout=limits.CLOSING)
        self.feeder.close()

    def run(self) -> None:
        self.feeder.start()
        for topic in (EXTENT_TOPIC, self._fetched_topic):
            self._socket.subscribe(topic)
        self._neighbours.listen()
        while not self._ending.is_set():
            receive_all(self._socket, self._sort, self.malformed, MESSAGES_AT_ONCE, self._count_undecodable)
            with self._lock:
                waiting = {body for body in self.streams if self.feeder.has_waiting(body)}
                self._neighbours.let_go(time.monotonic(), but=waiting)
            self._ask_for_missing()
            self._socket.poll(POLL_MS)
        self.link.close()
        self._socket.close()

    def _sort(self, message: Message) -> None:
        """Process a message; malformed parts of requested answers are counted."""
        live = message.topic != self._fetched_topic
        try:
            with self._lock:
                self._take_up(message, live)
        except WireError:
            self._count_spoilt(message.sender, live)
            raise
        self.feeder.wake()

    def _count_spoilt(self, body: str, live: bool) -> None:
        with self._lock:
            if not live and body in self.streams:
                self._spoilt[body] += 1

    def _take_up(self, message: Message, live: bool) -> None:
        """Process a message, or let it wait for its turn. Messages with records are large, and never wait."""
        if message.arrays and message.kind != RECORDS:
            raise WireError(f"{message.kind!r:.40} with arrays")
        match message.kind:
            case experience.PLACES:
                places = Places.from_message(message)
                stream = self._stream(places.body)
                if ring := self._neighbours.reach(places, time.monotonic()):
                    for place in places.batches:
                        copy = partial(self._copy, stream, ring, places.body, places.incarnation, place, live)
                        records = place.range[1] - place.range[0]
                        self.feeder.in_turn(places.body, Announcement(copy, ring, records))
            case experience.EXTENT:
                extent = Extent.from_message(message)
                stream = self._stream(extent.body)
                self.feeder.in_turn(extent.body, Announcement(partial(self._told, stream, extent)))
            case experience.FETCHED:
                ending = Fetched.from_message(message)
                stream = self._stream(ending.body)
                self.feeder.in_turn(ending.body, Announcement(partial(self._answered, stream, ending)))
            case _:
                batch = RecordBatch.from_message(message)
                if live and batch.body in self._neighbours:
                    return  # its records are read from shared memory
                if live and self._waits_behind(batch):
                    self._stream(batch.body).counters.postponed += len(batch)
                else:
                    self._arrived(self._stream(batch.body), batch, live)

    def _waits_behind(self, batch: RecordBatch) -> bool:
        """Return whether a life must wait, because records of the previous one are still unread in shared memory."""
        stream = self.streams.get(batch.body)
        life = stream.life if stream and self.feeder.has_waiting(batch.body) else None
        return life is not None and life.incarnation != batch.incarnation

    def _copy(
        self, stream: BodyStream, ring: RingReader, body: str, incarnation: str, place: Place, live: bool
    ) -> None:
        """Copy records from a body's memory; if they are gone, they count as missing. Called in the feeder's thread."""
        frames = ring.read(place.spans)
        if frames is None:
            return
        try:
            batch = RecordBatch.from_message(wire.decode([b"", *frames]))
            if (batch.body, batch.incarnation, batch.first_sequence, batch.end) != (body, incarnation, *place.range):
                raise WireError(f"the memory of {body!r:.80} holds other records than it announced")
        except WireError:
            self._count_spoilt(body, live)
            raise
        with self._lock:
            stream.from_memory += len(batch)
            self._arrived(stream, batch, live)

    def _arrived(self, stream: BodyStream, batch: RecordBatch, live: bool) -> None:
        present = stream.arrived(batch, live, time.monotonic())
        stream.nbytes += batch.nbytes
        if live and present:
            stream.record_age_s = self._clock.time() - float(batch.times[-1])
            self.newest_versions[batch.body] = {model: int(of[-1]) for model, of in batch.versions.items()}

    def _told(self, stream: BodyStream, extent: Extent) -> None:
        with self._lock:
            stream.told(extent, time.monotonic())

    def _answered(self, stream: BodyStream, ending: Fetched) -> None:
        with self._lock:
            spoilt = self._spoilt.pop(ending.body, 0) + self._spoilt.pop(ANYBODY, 0)
            stream.answered(ending, time.monotonic(), spoilt > 0)

    def _count_undecodable(self, topic: bytes) -> None:
        with self._lock:
            self._spoilt[ANYBODY] += topic == self._fetched_topic

    def _stream(self, body: str) -> BodyStream:
        """Return the stream of a body that has just been heard from; create it if necessary."""
        if body not in self.streams:
            self._make_room_for(body)
            self.streams[body] = BodyStream(self._history)
            if body in self._forgotten:  # it continues where it stopped: nothing is taken twice
                self.streams[body].restore(self._forgotten.pop(body), broken=True)
        self._heard_at[body] = time.monotonic()
        self._neighbours.heard_of(body)
        return self.streams[body]

    def _make_room_for(self, body: str) -> None:
        """If the number of bodies is at its limit, forget the one that has been silent longest, if it is gone."""
        if len(self.streams) < limits.MOST_BODIES:
            return
        silent = min(self.streams, key=lambda other: self._heard_at[other])
        if time.monotonic() - self._heard_at[silent] < limits.BODY_IS_GONE:
            raise WireError(f"experience of {body!r:.80}: there are {limits.MOST_BODIES} bodies already")
        stream = self.streams[silent]
        if state := stream.state():
            self._forgotten[silent] = {**state, "behind": stream.behind}
            while len(self._forgotten) > limits.MOST_MEMBERS:
                self._forgotten.popitem(last=False)
        self.feeder.forget(silent)
        for known in (self._heard_at, self.newest_versions, self._spoilt):
            known.pop(silent, None)
        self._neighbours.forget(silent)
        log.info("%s, silent for long, is forgotten to make room for %s", silent, body)

    def _ask_for_missing(self) -> None:
        with self._lock:
            for body, stream in self.streams.items():
                if wanted := stream.wish(time.monotonic()):
                    wish = Fetch(self._identity.name, body, *wanted, places=body in self._neighbours)
                    self._ask(wish.to_message(self._identity.incarnation))

    def state(self) -> dict[str, Any]:
        """Return how far every body's stream has been passed on. Call it at a cut, while nothing moves."""
        with self._lock:
            return {body: stream.state() for body, stream in self.streams.items() if stream.life}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where an earlier process stopped; call it before start()."""
        for body, kept in state.items():
            self._stream(body).restore(kept)
            self.feeder.consumed[body] = (str(kept["incarnation"]), int(kept["frontier"]))

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the stream at this end."""
        now = time.monotonic()
        return {
            "streams": {body: stream.statistics(now) for body, stream in list(self.streams.items())},
            "experience_wire_errors": self.malformed.count,
        }
