"""The records that a body has published and still retains: bounded in bytes. No sockets and no clock here."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from ami_shared.experience import Place, Range

Frames = Sequence[bytes | memoryview]

FRAME_OVERHEAD_BYTES = 300  # of the objects that hold one frame, as measured


@dataclass(frozen=True, slots=True)
class SentBatch:
    """One batch as it was published.

    Attributes:
        range: of its records.
        frames: the frames after the topic.
        position: where in the ring of bytes the frames begin, as far as they are there.
        place: what processes of the same host need to find the frames there; None if they cannot.
    """

    range: Range
    frames: Frames
    position: int
    place: Place | None = None

    @property
    def nbytes(self) -> int:
        """The memory needed to retain it, in bytes."""
        return sum(len(frame) + FRAME_OVERHEAD_BYTES for frame in self.frames)


@dataclass(frozen=True)
class Answer:
    """Which records of a range are retained.

    Attributes:
        batches: in order; the first and the last may extend beyond the range.
        range: the records that the answer covers: from the beginning of the requested range, perhaps not to its end.
        gone: parts of `range` that are in none of the batches.
    """

    batches: tuple[SentBatch, ...]
    range: Range
    gone: tuple[Range, ...]


class Retained:
    """The newest batches, as many as fit into `capacity_bytes` and have not been overwritten."""

    def __init__(self, capacity_bytes: int) -> None:
        self._batches: deque[SentBatch] = deque()
        self._capacity_bytes = capacity_bytes
        self._nbytes = self._records = self._end = 0

    def add(self, batch: SentBatch, gone: int) -> None:
        """Retain a batch that follows the last one, and drop the oldest.

        Args:
            batch: the batch.
            gone: position before which the ring of bytes has been overwritten.
        """
        self.skip_to(batch.range[1], gone)
        self._batches.append(batch)
        self._nbytes += batch.nbytes
        self._records += batch.range[1] - batch.range[0]
        while len(self._batches) > 1 and self._nbytes > self._capacity_bytes:
            self._let_oldest_go()

    def skip_to(self, end: int, gone: int) -> None:
        """Note that records before `end` that are not retained never will be, and drop what is overwritten.

        Args:
            end: number of a record.
            gone: position before which the ring of bytes has been overwritten.
        """
        self._end = end
        while self._batches and self._batches[0].position < gone:
            self._let_oldest_go()

    def _let_oldest_go(self) -> None:
        oldest = self._batches.popleft()
        self._nbytes -= oldest.nbytes
        self._records -= oldest.range[1] - oldest.range[0]

    @property
    def range(self) -> Range:
        """From the oldest retained record to the one after the newest record so far."""
        return (self._batches[0].range[0] if self._batches else self._end, self._end)

    def answer(self, wanted: Range, at_most_bytes: int, at_most_batches: int, by_place: bool = False) -> Answer:
        """Return what is retained of a range: at least one batch if there is any, and otherwise within the bounds.

        Args:
            wanted: the requested range.
            at_most_bytes: bound on the size of the batches.
            at_most_batches: bound on their number.
            by_place: whether batches that have a place count as 0 bytes.
        """
        first, end = wanted[0], min(wanted[1], self.range[1])
        place = bisect_right(self._batches, first, key=lambda batch: batch.range[1])
        chosen: list[SentBatch] = []
        gone: list[Range] = []
        reached, nbytes = first, 0
        for batch in islice(self._batches, place, place + at_most_batches):
            nbytes += 0 if by_place and batch.place else batch.nbytes
            if batch.range[0] >= end or (chosen and nbytes > at_most_bytes):
                break
            if batch.range[0] > reached:
                gone.append((reached, batch.range[0]))
            chosen.append(batch)
            reached = batch.range[1]
        if not chosen and first < end:
            gone.append((first, end))
            reached = end
        return Answer(tuple(chosen), (first, max(first, min(reached, end))), tuple(gone))

    def statistics(self) -> dict[str, int]:
        """Return how much is retained."""
        return {"records": self._records, "bytes": self._nbytes, "capacity_bytes": self._capacity_bytes}
