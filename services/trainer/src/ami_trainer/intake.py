"""The experience stream's receiving end: a thread that puts records into the trainer's buffer, in order, once.

It receives everything from the wire before it passes on what is in order, so that a slow buffer does not stop it from
receiving. Records in the memory of a body on the same host are safe there: they are copied when the buffer is ready.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import zmq

from ami_shared import experience, limits, wire
from ami_shared.bus import EXPERIENCE, HubAddress, Port, dial
from ami_shared.checkpoints import Cut
from ami_shared.clock import Clock, Rate, SystemClock
from ami_shared.errors import WireError
from ami_shared.experience import EXTENT_TOPIC, Extent, Fetch, Fetched, Place, Places, fetched_topic
from ami_shared.links import LinkWatch
from ami_shared.membership import Identity
from ami_shared.receiving import Malformed, receive_all
from ami_shared.records import MESSAGE_TYPE as RECORDS
from ami_shared.records import RecordBatch
from ami_shared.shared_ring import RingReader
from ami_shared.wire import Message
from ami_trainer.frontier import BodyStream
from ami_trainer.neighbours import Neighbours

log = logging.getLogger(__name__)

POLL_MS = 100
MESSAGES_AT_ONCE = 64
ANYBODY = ""  # the sender of what cannot be decoded


@dataclass(frozen=True)
class _Told:
    """A body's announcement that waits for its turn.

    Attributes:
        take: processes it.
        ring: the memory that holds the announced records, if any.
        records: their number.
    """

    take: Callable[[], None]
    ring: RingReader | None = None
    records: int = 0


class Intake(threading.Thread):
    """Receives the experience of all bodies.

    Attributes:
        consumed: body → its incarnation, and the number after its last record passed on.
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
            consume: takes a batch of new records, and whether it continues the body's last one without a gap;
                raises WireError if the records do not fit. Called in the intake's thread.
            history: how many records from before this trainer joined are useful.
            ask: sends a message to a body via the controller; never blocks.
            on_consumed: called after `consume`, when `consumed` includes the batch, and when `cut` has been reached.
            clock: tells the time.
        """
        super().__init__(name="intake", daemon=True)
        self._identity, self._consume, self._history = identity, consume, history
        self._ask, self._on_consumed = ask, on_consumed
        self._clock = clock or SystemClock()
        self._fetched_topic = fetched_topic(identity.name)
        self._ending = threading.Event()
        self.link = LinkWatch()
        self._socket = dial(context, zmq.SUB, hub, Port.EXPERIENCE_OUT, EXPERIENCE, self.link)
        self._neighbours = Neighbours(self._socket)
        self._rate, self._catching_up = Rate(), Rate()
        self._bytes = self._from_memory = 0
        self.newest_versions: dict[str, dict[str, int]] = {}
        self.malformed = Malformed(log, "experience")
        self.streams: dict[str, BodyStream] = {}
        self._unread: dict[str, deque[_Told]] = {}
        self._heard_at: dict[str, float] = {}
        self._spoilt: Counter[str] = Counter()  # body → number of malformed parts of requested answers
        self._forgotten: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._fetched_by_forgotten = 0
        self.consumed: dict[str, tuple[str, int]] = {}
        self.cut: Cut | None = None
        self._passed: Cut | None = None
        self._wished: Cut | None = None
        self._standing: dict[str, Cut] = {}  # the cut that each body's stream stands at
        self._standing_since = 0.0
        self.records = 0

    @property
    def present(self) -> dict[str, tuple[str, int]]:
        """What `consumed` says of the bodies that are heard; of all, if none is: they may be starting again."""
        now, consumed = time.monotonic(), dict(self.consumed)
        heard = {body for body in consumed if now - self._heard_at.get(body, now) <= limits.SILENT_BODY}
        return {body: frontier for body, frontier in consumed.items() if body in heard} or consumed

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        if self.is_alive():
            self.join(timeout=limits.CLOSING)

    def run(self) -> None:
        for topic in (EXTENT_TOPIC, self._fetched_topic):
            self._socket.subscribe(topic)
        self._neighbours.listen()
        self._standing_since = time.monotonic()
        while not self._ending.is_set():
            receive_all(self._socket, self._sort, self.malformed, MESSAGES_AT_ONCE, self._count_undecodable)
            self._read_on()
            self._neighbours.let_go(time.monotonic(), but=[body for body, unread in self._unread.items() if unread])
            self._ask_for_missing(time.monotonic())
            self._look_for_cut(time.monotonic())
            if not self._hand_on():
                self._socket.poll(POLL_MS)
        self.link.close()
        self._socket.close()

    def _sort(self, message: Message) -> None:
        """Process a message; malformed parts of requested answers are counted."""
        live = message.topic != self._fetched_topic
        try:
            self._take_up(message, live)
        except WireError:
            self._count_spoilt(message.sender, live)
            raise

    def _count_spoilt(self, body: str, live: bool) -> None:
        if not live and body in self.streams:
            self._spoilt[body] += 1

    def _take_up(self, message: Message, live: bool) -> None:
        """Process a message, or let it wait for its turn. Messages with records are large, and never wait."""
        if message.arrays and message.kind != RECORDS:
            raise WireError(f"{message.kind!r:.40} with arrays")
        match message.kind:
            case experience.PLACES:
                places = Places.from_message(message)
                self._stream(places.body)
                if ring := self._neighbours.reach(places, time.monotonic()):
                    for place in places.batches:
                        copy = partial(self._copy, ring, places.body, places.incarnation, place, live)
                        self._in_turn(places.body, _Told(copy, ring, place.range[1] - place.range[0]))
            case experience.EXTENT:
                extent = Extent.from_message(message)
                stream = self._stream(extent.body)
                self._in_turn(extent.body, _Told(partial(self._told, stream, extent)))
            case experience.FETCHED:
                ending = Fetched.from_message(message)
                stream = self._stream(ending.body)
                self._in_turn(ending.body, _Told(partial(self._answered, stream, ending)))
            case _:
                batch = RecordBatch.from_message(message)
                if live and batch.body in self._neighbours:
                    return  # its records are read from shared memory
                if live and self._waits_behind(batch):
                    self._stream(batch.body).counters.postponed += len(batch)
                else:
                    self._arrived(batch, live)

    def _waits_behind(self, batch: RecordBatch) -> bool:
        """Return whether a life must wait, because records of the previous one are still unread in shared memory."""
        stream = self.streams.get(batch.body)
        life = stream.life if stream and self._unread.get(batch.body) else None
        return life is not None and life.incarnation != batch.incarnation

    def _in_turn(self, body: str, told: _Told) -> None:
        """Process an announcement, or queue it: records in memory if many are copied already, and all later ones."""
        stream, unread = self.streams[body], self._unread.setdefault(body, deque())
        if not unread and (stream.has_room or not told.ring):
            self._take(told)
            return
        rings = {id(waiting.ring) for waiting in unread if waiting.ring} if told.ring else set()
        if len(unread) < limits.UNREAD_MESSAGES and len(rings | {id(told.ring)}) <= limits.UNREAD_RINGS:
            unread.append(told)
            stream.unread += told.records
        else:
            stream.counters.postponed += told.records

    def _read_on(self) -> None:
        """Process queued announcements, as far as there is room."""
        for body, unread in self._unread.items():
            stream = self.streams[body]
            while unread and (stream.has_room or not unread[0].ring):
                told = unread.popleft()
                stream.unread -= told.records
                self._take(told)

    def _take(self, told: _Told) -> None:
        """Process an announcement; a malformed batch in a neighbour's memory does not affect the others."""
        try:
            told.take()
        except WireError as error:
            self.malformed.dropped(error)

    def _copy(self, ring: RingReader, body: str, incarnation: str, place: Place, live: bool) -> None:
        """Copy records from a body's memory; if they are gone, they count as missing."""
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
        self._from_memory += len(batch)
        self._arrived(batch, live)

    def _arrived(self, batch: RecordBatch, live: bool) -> None:
        stream = self._stream(batch.body)
        present = stream.arrived(batch, live, time.monotonic())
        self._bytes += batch.nbytes
        if live and present:
            stream.record_age_s = self._clock.time() - float(batch.times[-1])
            self.newest_versions[batch.body] = {model: int(of[-1]) for model, of in batch.versions.items()}

    def _told(self, stream: BodyStream, extent: Extent) -> None:
        stream.told(extent, time.monotonic())

    def _answered(self, stream: BodyStream, ending: Fetched) -> None:
        spoilt = self._spoilt.pop(ending.body, 0) + self._spoilt.pop(ANYBODY, 0)
        stream.answered(ending, time.monotonic(), spoilt > 0)

    def _count_undecodable(self, topic: bytes) -> None:
        self._spoilt[ANYBODY] += topic == self._fetched_topic

    def _stream(self, body: str) -> BodyStream:
        """Return the stream of a body that has just been heard from; create it if necessary."""
        if body not in self.streams:
            self._make_room_for(body)
            self.streams[body] = BodyStream(self._history)
            if body in self._forgotten:  # it continues where it stopped: nothing is taken twice
                self.streams[body].restore(self._forgotten.pop(body), broken=True)
                self._fetched_by_forgotten -= self.streams[body].counters.fetched
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
        self._fetched_by_forgotten += stream.counters.fetched
        for known in (self.streams, self._unread, self.consumed, self._heard_at, self.newest_versions, self._spoilt):
            known.pop(silent, None)
        self._neighbours.forget(silent)
        log.info("%s, silent for long, is forgotten to make room for %s", silent, body)

    def _ask_for_missing(self, now: float) -> None:
        for body, stream in self.streams.items():
            if wanted := stream.wish(now):
                wish = Fetch(self._identity.name, body, *wanted, places=body in self._neighbours)
                self._ask(wish.to_message(self._identity.incarnation))

    def wish_cut(self, cut: Cut) -> None:
        """Request a cut that no stream will announce, since no body takes part in it. Thread-safe."""
        if not cut.bodies:
            self._wished = cut

    def _look_for_cut(self, now: float) -> None:
        """Check whether all bodies of a cut stand at it: then nothing is passed on until pass_cut()."""
        if self._wished and not self.cut:
            self.cut, self._wished = self._wished, None
            self._on_consumed()
        standing = {body: cut for body, stream in self.streams.items() if (cut := stream.at_cut)}
        waiting = self.cut  # read before _passed, which pass_cut() sets first: so no cut is taken twice
        for body, cut in standing.items():
            if cut == self._passed:
                self.streams[body].pass_cut()
            elif cut != waiting and all(standing.get(other) == cut for other in cut.bodies):
                self.cut = cut
                self._on_consumed()
        if not standing or self.cut or standing != self._standing:
            self._standing, self._standing_since = standing, now
        elif now - self._standing_since > limits.CUT_PATIENCE:
            waited_for = {body for cut in standing.values() for body in cut.bodies} - standing.keys()
            whom = ", ".join(sorted(waited_for)) or "the bodies together"
            log.warning("no cut for a checkpoint came from %s: continuing without", whom)
            self._passed = next(iter(standing.values()))

    def pass_cut(self, cut: Cut) -> None:
        """Let records after the cut be passed on; called when it has been taken."""
        self._passed, self.cut = cut, None

    def state(self) -> dict[str, Any]:
        """Return how far every body's stream has been passed on. Call it at a cut, while nothing moves."""
        return {body: stream.state() for body, stream in list(self.streams.items()) if stream.life}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where an earlier process stopped; call it before start()."""
        for body, kept in state.items():
            self._stream(body).restore(kept)
            self.consumed[body] = (str(kept["incarnation"]), int(kept["frontier"]))
        self._catching_up = Rate()  # the counts so far are an earlier process's

    def _hand_on(self) -> bool:
        """Pass one batch of each body on to the buffer; return whether there was any.

        While a cut is taken there is none: the buffer stands still, even if bodies publish that are not part of it.
        """
        if self.cut:
            return False
        taken = [(stream, *taken) for stream in self.streams.values() if (taken := stream.take())]
        for stream, batch, continues in taken:
            try:
                self._consume(batch, continues)
                self.records += len(batch)
            except WireError as error:
                stream.refuse(batch)
                self.malformed.dropped(error)
            self.consumed[batch.body] = (batch.incarnation, batch.end)  # refused records are done with too
            self._on_consumed()
        return bool(taken)

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the stream at this end."""
        streams = {body: stream.statistics() for body, stream in list(self.streams.items())}
        fetched = self._fetched_by_forgotten + sum(told["fetched"] for told in streams.values())
        return {
            "streams": streams,
            "intake_rate_hz": self._rate.update(time.monotonic(), self.records),
            "catch_up_hz": self._catching_up.update(time.monotonic(), fetched),
            "bytes_received": self._bytes,
            "records_from_memory": self._from_memory,
            "experience_wire_errors": self.malformed.count,
        }
