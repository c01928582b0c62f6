"""Records of finished steps, and the batches that carry them from a body to the trainers.

A batch holds consecutive records of one body, column by column, so that it costs the wire the same few frames
whether it carries one record or many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from ami_shared import limits
from ami_shared.checkpoints import Cut
from ami_shared.errors import WireError
from ami_shared.wire import Array, Message

TOPIC = b"experience/"
MESSAGE_TYPE = "records"
_VERSION, _DATA = "version/", "data/"


def topic(body: str) -> bytes:
    """Return the topic of one body's records; the end keeps it from being another one's prefix."""
    return TOPIC + f"{body}/".encode()


class Ending(IntEnum):
    """How an episode ended, if it did. Only after a terminated one are further rewards known to be 0."""

    NONE = 0
    TRUNCATED = 1
    TERMINATED = 2


_LAST_ENDING = max(Ending)


class Record(NamedTuple):
    """The data of one step, with the reward that came with its observation.

    So the reward of an action is in the next record, if that one belongs to the same segment. The last
    record of an episode holds its last observation and reward; its action was never carried out.

    Attributes:
        segment: number of the uninterrupted stretch that it belongs to, within the incarnation.
        sequence: number of the record within the incarnation, without gaps, from 0.
        time: when the step was taken, seconds since the epoch, by the hub's clock once it is known.
        lateness_s: how late the step began on the body's time grid.
        versions: version of each model that the step used.
        ending: whether its observation was an episode's last.
        swapped: whether parameters were exchanged between the previous step and this one.
        data: the agent's own arrays, e.g. observation (3, H, W) uint8, embedding (Z,) float32, action (A,) int64.
    """

    segment: int
    sequence: int
    time: float
    lateness_s: float
    versions: Mapping[str, int]
    data: Mapping[str, Array]
    ending: Ending = Ending.NONE
    swapped: bool = False


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of one incarnation of one body, stacked: the first axis of every array is N.

    Attributes:
        segments: (N,) int64.
        times: (N,) float64, seconds since the epoch.
        latenesses_s: (N,) float32.
        endings: (N,) uint8, values of Ending.
        swapped: (N,) bool.
        versions: model → (N,) int64.
        data: name → (N, …), the record's own dtype.
        cut: the cut of the whole system right before the first record, if there is one.
    """

    body: str
    incarnation: str
    first_sequence: int
    segments: Array
    times: Array
    latenesses_s: Array
    endings: Array
    swapped: Array
    versions: Mapping[str, Array]
    data: Mapping[str, Array]
    cut: Cut | None = None

    def __len__(self) -> int:
        return len(self.segments)

    @classmethod
    def stack(
        cls,
        body: str,
        incarnation: str,
        records: Sequence[Record],
        cut: Cut | None = None,
        room: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty,
    ) -> RecordBatch:
        """Stack consecutive records with the same names, dtypes and shapes.

        Args:
            body: name of the body.
            incarnation: of the body.
            records: to be stacked.
            cut: the cut right before the first record, if there is one.
            room: returns an array of the given shape and dtype, into which a column of `data` is stacked.

        Raises:
            ValueError: they differ in names or shapes.
            TypeError: they differ in dtypes that have no common dtype.
        """
        first = records[0]
        segments, _, times, latenesses_s, versions, data, endings, swapped = zip(*records, strict=True)
        if any(of.keys() != first.data.keys() for of in data):
            raise ValueError("records have arrays of different names")
        return cls(
            body=body,
            incarnation=incarnation,
            first_sequence=first.sequence,
            segments=np.array(segments, np.int64),
            times=np.array(times, np.float64),
            latenesses_s=np.array(latenesses_s, np.float32),
            endings=np.frombuffer(bytearray(endings), np.uint8),
            swapped=np.array(swapped, np.bool_),
            versions={model: np.array([of[model] for of in versions], np.int64) for model in first.versions},
            data={name: _stacked([of[name] for of in data], room) for name in first.data},
            cut=cut,
        )

    def tail(self, skip: int) -> RecordBatch:
        """Return the batch without its first `skip` records."""
        return RecordBatch(
            self.body,
            self.incarnation,
            self.first_sequence + skip,
            self.segments[skip:],
            self.times[skip:],
            self.latenesses_s[skip:],
            self.endings[skip:],
            self.swapped[skip:],
            {name: column[skip:] for name, column in self.versions.items()},
            {name: column[skip:] for name, column in self.data.items()},
        )

    @property
    def end(self) -> int:
        """The sequence number after the last one."""
        return self.first_sequence + len(self)

    @property
    def nbytes(self) -> int:
        """Size of all columns in bytes."""
        columns = (self.segments, self.times, self.latenesses_s, self.endings, self.swapped)
        return sum(column.nbytes for column in (*columns, *self.versions.values(), *self.data.values()))

    def to_message(self) -> Message:
        """Return the message that from_message() reads back."""
        arrays = {"segment": self.segments, "time": self.times, "lateness": self.latenesses_s}
        arrays |= {"ending": self.endings, "swapped": self.swapped}
        arrays |= {_VERSION + name: column for name, column in self.versions.items()}
        arrays |= {_DATA + name: column for name, column in self.data.items()}
        return Message(
            MESSAGE_TYPE,
            self.body,
            self.incarnation,
            {"first": self.first_sequence} | ({"cut": self.cut.to_list()} if self.cut else {}),
            arrays,
            topic=topic(self.body),
        )

    @classmethod
    def from_message(cls, message: Message) -> RecordBatch:
        """Parse a batch; raise WireError if a column is missing or has the wrong length or dtype."""
        if message.kind != MESSAGE_TYPE:
            raise WireError(f"message {message.kind!r:.40} on the experience stream")
        first = message.get("first", int)
        if not 0 <= first < limits.MAX_SEQUENCE:
            raise WireError(f"records: first sequence number {first} out of range")
        columns = dict(message.arrays)
        segments = _column(columns, "segment", np.int64)
        times = _column(columns, "time", np.float64)
        latenesses = _column(columns, "lateness", np.float32)
        endings, swapped = _column(columns, "ending", np.uint8), _column(columns, "swapped", np.bool_)
        if any(column.shape[:1] != segments.shape for column in message.arrays.values()):
            raise WireError(f"records: columns of different lengths, expected {len(segments)}")
        versions = _prefixed(columns, _VERSION)
        if any(column.shape != segments.shape or column.dtype != np.int64 for column in versions.values()):
            raise WireError("records: versions must be int64 of shape (N,)")
        data = _prefixed(columns, _DATA)
        if len(segments) == 0 or not np.isfinite(times).all():
            raise WireError("records: empty batch or times that are not finite")
        if endings.max() > _LAST_ENDING:
            raise WireError("records: unknown kind of ending")
        about = (segments, times, latenesses, endings, swapped)
        cut = Cut.from_list(message.fields["cut"]) if "cut" in message.fields else None
        return cls(message.sender, message.incarnation, first, *about, versions, data, cut)


def _stacked(arrays: Sequence[Array], room: Callable[[tuple[int, ...], np.dtype[Any]], Array]) -> Array:
    kinds = {(array.dtype, array.shape) for array in arrays}
    dtype, shape = kinds.pop()
    if kinds or not shape:
        return np.stack(arrays)
    stacked = room((len(arrays), *shape), dtype)
    np.concatenate(arrays, out=stacked.reshape(len(arrays) * shape[0], *shape[1:]))  # np.stack has more overhead
    return stacked


def _column(columns: dict[str, Array], name: str, dtype: type[np.generic]) -> Array:
    column = columns.pop(name, None)
    if column is None or column.ndim != 1 or column.dtype != dtype:
        raise WireError(f"records: column {name!r} must be {dtype.__name__} of shape (N,)")
    return column


def _prefixed(columns: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): column for name, column in columns.items() if name.startswith(prefix)}
