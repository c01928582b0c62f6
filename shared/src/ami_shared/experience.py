"""What bodies and trainers say to each other about the experience stream, besides the records themselves.

extent    body → all trainers, on the stream, again and again: which records it retains
fetch     trainer → body, over control: the records that are missing
fetched   body → that trainer, on the stream, behind the records: how far the answer went, and what is gone
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ami_shared import limits
from ami_shared.checkpoints import Cut
from ami_shared.errors import WireError
from ami_shared.wire import Message

Range = tuple[int, int]  # first sequence number, and the one after the last

EXTENT, FETCH, FETCHED = "extent", "fetch", "fetched"
EXTENT_TOPIC, FETCHED_TOPIC = b"extent/", b"fetched/"


def fetched_topic(trainer: str) -> bytes:
    """Return the topic of what one trainer asked for; the closing slash keeps `a` from matching `ab`."""
    return FETCHED_TOPIC + f"{trainer}/".encode()


@dataclass(frozen=True)
class Extent:
    """What a body retains of its records: those of `range`, as far as none were dropped before they were sent.

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
        return Message(EXTENT, self.body, self.incarnation, fields, topic=EXTENT_TOPIC + self.body.encode())

    @classmethod
    def from_message(cls, message: Message) -> Extent:
        """Read an extent; raise WireError where something is off."""
        return cls(message.sender, message.incarnation, _range(message.get("range", list), EXTENT), _cut(message))


@dataclass(frozen=True)
class Fetch:
    """A trainer's wish for the records of `range` of one incarnation of a body."""

    trainer: str
    body: str
    incarnation: str
    range: Range

    def to_message(self, own_incarnation: str) -> Message:
        """Return the message that from_message() reads back; `own_incarnation` is the trainer's."""
        fields = {"body": self.body, "incarnation": self.incarnation, "range": list(self.range)}
        return Message(FETCH, self.trainer, own_incarnation, fields)

    @classmethod
    def from_message(cls, message: Message) -> Fetch:
        """Read a wish; raise WireError where something is off."""
        body, incarnation = message.get("body", str), message.get("incarnation", str)
        return cls(message.sender, body, incarnation, _range(message.get("range", list), FETCH))


@dataclass(frozen=True)
class Fetched:
    """The end of an answer to a Fetch.

    Attributes:
        range: what the answer is about; it may end before the range asked for.
        gone: parts of it that the body does not have any more. All the rest was sent.
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
        """Read the end of an answer; raise WireError where something is off."""
        gone = tuple(_range(part, FETCHED) for part in message.get("gone", list))
        return cls(message.sender, message.incarnation, _range(message.get("range", list), FETCHED), gone)


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
