"""The messages of bodies and trainers about the experience stream, besides the records themselves.

places    body → trainers that ask, on the stream: where in its memory new records are, for processes of the same host
extent    body → all trainers, on the stream, repeatedly: which records it retains
fetch     trainer → body, over control: the records that are missing
fetched   body → that trainer, on the stream, behind the records: how far the answer went, and what is gone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ami_shared import limits
from ami_shared.checkpoints import Cut
from ami_shared.errors import WireError
from ami_shared.shared_memory import Reference
from ami_shared.shared_ring import Span
from ami_shared.wire import Message

Range = tuple[int, int]  # first sequence number, and the one after the last

PLACES, EXTENT, FETCH, FETCHED = "places", "extent", "fetch", "fetched"
PLACES_TOPIC, EXTENT_TOPIC, FETCHED_TOPIC = b"places/", b"extent/", b"fetched/"


def places_topic(body: str) -> bytes:
    """Return the topic of where one body's records are; the end keeps it from being another one's prefix."""
    return PLACES_TOPIC + f"{body}/".encode()


def fetched_topic(trainer: str) -> bytes:
    """Return the topic of the answers to one trainer; the closing slash keeps `a` from matching `ab`."""
    return FETCHED_TOPIC + f"{trainer}/".encode()


@dataclass(frozen=True)
class Place:
    """Where in a body's ring one batch of records is: the frames after the topic, as they would be sent."""

    range: Range
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Places:
    """Where in a body's memory some of its batches are."""

    body: str
    incarnation: str
    memory: Reference
    batches: tuple[Place, ...]

    def to_message(self, trainer: str | None = None) -> Message:
        """Return the message that from_message() reads back; for all trainers, or for the one that asked."""
        batches = [[list(place.range), [list(span) for span in place.spans]] for place in self.batches]
        fields = {"memory": self.memory.to_list(), "batches": batches}
        topic = places_topic(self.body) if trainer is None else fetched_topic(trainer)
        return Message(PLACES, self.body, self.incarnation, fields, topic=topic)

    @classmethod
    def from_message(cls, message: Message) -> Places:
        """Parse places; raise WireError if the message is malformed."""
        memory = Reference.from_list(message.get("memory", list))
        entries = message.get("batches", list)
        if len(entries) > limits.FETCH_BATCHES:
            raise WireError(f"{PLACES}: {len(entries)} batches, limit {limits.FETCH_BATCHES}")
        batches = tuple(_place(entry, memory.nbytes) for entry in entries)
        if (count := sum(len(place.spans) for place in batches)) > limits.PLACES_SPANS:
            raise WireError(f"{PLACES}: {count} spans, limit {limits.PLACES_SPANS}")
        return cls(message.sender, message.incarnation, memory, batches)


@dataclass(frozen=True)
class Extent:
    """Which records a body retains: those of `range`, except any that were dropped before they were sent.

    Attributes:
        cut: the newest cut of the whole system, and the number of the first record after it.
    """

    body: str
    incarnation: str
    range: Range
    cut: tuple[Cut, int] | None = None

    def to_message(self) -> Message:
        """Return the message that from_message() reads back."""
        fields: dict[str, Any] = {"range": list(self.range)}
        if self.cut:
            fields["cut"] = [*self.cut[0].to_list(), self.cut[1]]
        return Message(EXTENT, self.body, self.incarnation, fields, topic=EXTENT_TOPIC + f"{self.body}/".encode())

    @classmethod
    def from_message(cls, message: Message) -> Extent:
        """Parse an extent; raise WireError if the message is malformed."""
        return cls(message.sender, message.incarnation, _range(message.get("range", list), EXTENT), _cut(message))


@dataclass(frozen=True)
class Fetch:
    """A trainer's request for the records of `range` of one incarnation of a body.

    Attributes:
        places: whether it suffices to tell where in the body's memory they are.
    """

    trainer: str
    body: str
    incarnation: str
    range: Range
    places: bool = False

    def to_message(self, own_incarnation: str) -> Message:
        """Return the message that from_message() reads back; `own_incarnation` is the trainer's."""
        fields = {"body": self.body, "incarnation": self.incarnation, "range": list(self.range)}
        return Message(FETCH, self.trainer, own_incarnation, fields | ({"places": True} if self.places else {}))

    @classmethod
    def from_message(cls, message: Message) -> Fetch:
        """Parse a request; raise WireError if the message is malformed."""
        body, incarnation = message.get("body", str), message.get("incarnation", str)
        places = message.fields.get("places") is True
        return cls(message.sender, body, incarnation, _range(message.get("range", list), FETCH), places)


@dataclass(frozen=True)
class Fetched:
    """The end of an answer to a Fetch.

    Attributes:
        range: the records that the answer covers; it may end before the requested range does.
        gone: parts of it that the body no longer has. All the rest was sent.
    """

    body: str
    incarnation: str
    range: Range
    gone: tuple[Range, ...] = field(default=())

    def to_message(self, trainer: str) -> Message:
        """Return the message that from_message() reads back."""
        fields = {"range": list(self.range), "gone": [list(part) for part in self.gone]}
        return Message(FETCHED, self.body, self.incarnation, fields, topic=fetched_topic(trainer))

    @classmethod
    def from_message(cls, message: Message) -> Fetched:
        """Parse the end of an answer; raise WireError if the message is malformed."""
        parts = message.get("gone", list)
        if len(parts) > limits.FETCH_BATCHES + 1:
            raise WireError(f"{FETCHED}: {len(parts)} parts are gone, limit {limits.FETCH_BATCHES + 1}")
        gone = tuple(_range(part, FETCHED) for part in parts)
        return cls(message.sender, message.incarnation, _range(message.get("range", list), FETCHED), gone)


def _place(entry: object, capacity_bytes: int) -> Place:
    match entry:
        case [range_, [_, *_] as spans] if len(spans) <= limits.PLACES_SPANS:
            place = Place(_range(range_, PLACES), tuple(_span(span) for span in spans))
            if sum(nbytes for _, nbytes in place.spans) <= min(capacity_bytes, limits.MAX_EXPERIENCE_FRAME_BYTES):
                return place
    raise WireError(f"{PLACES}: a batch is not [[first, end], [[position, bytes]…]] within its memory")


def _span(value: object) -> Span:
    match value:
        case [int(position), int(nbytes)] if (
            type(position) is type(nbytes) is int
            and 0 <= position < 1 << 63
            and 0 <= nbytes <= limits.MAX_EXPERIENCE_FRAME_BYTES
        ):
            return position, nbytes
    raise WireError(f"{PLACES}: a span is not [position, bytes]")


def _cut(message: Message) -> tuple[Cut, int] | None:
    match message.fields.get("cut"):
        case None:
            return None
        case [*cut, int(first)] if 0 <= first < limits.MAX_SEQUENCE and type(first) is int:
            return Cut.from_list(cut), first
    raise WireError(f"{EXTENT}: a cut is not [checkpoint, [body…], first]")


def _range(value: object, where: str) -> Range:
    match value:
        case [int(first), int(end)] if 0 <= first <= end < limits.MAX_SEQUENCE and type(first) is type(end) is int:
            return first, end
    raise WireError(f"{where}: a range is not [first, end]")
