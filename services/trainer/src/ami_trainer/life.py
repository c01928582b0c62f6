"""How far a trainer has received one life of a body: in order, exactly once; gaps are fetched, or counted as lost.

A life is what one incarnation of the body publishes. Pure: takes what has arrived and the time; returns what to take
into the buffer and what to request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from ami_shared import limits
from ami_shared.checkpoints import Cut
from ami_shared.experience import Fetched, Range
from ami_shared.records import RecordBatch

SPOILT_ANSWERS = 3  # malformed answers in a row, after which the missing records count as lost


@dataclass
class Counters:
    """The fate of one body's records.

    Attributes:
        received: passed on to the buffer.
        lost: gone for good: left the body's ring, or died with the body, or did not fit the buffer.
        duplicates: arrived again, and were ignored.
        gaps: stretches missing from the live stream.
        missed: records in the gaps.
        postponed: arrived while too much was waiting; fetched later.
        fetched: arrived on request.
        asked: requests sent to the body.
        lost_from, lost_to: numbers of the first record lost in the latest stretch, and of the one after its last.
    """

    received: int = 0
    lost: int = 0
    duplicates: int = 0
    gaps: int = 0
    missed: int = 0
    postponed: int = 0
    fetched: int = 0
    asked: int = 0
    lost_from: int = 0
    lost_to: int = 0

    def lose(self, first: int, end: int) -> None:
        """Count a stretch of records as lost."""
        self.lost += end - first
        self.lost_from, self.lost_to = (self.lost_from if first == self.lost_to else first), end


class Life:
    """One incarnation's stream, starting at the first record wanted.

    `frontier` is the first sequence number not accepted yet. Accepted records wait in order to be taken; records after
    a gap wait separately until the gap is filled. Both are bounded in bytes: the excess is fetched later.
    """

    def __init__(
        self,
        incarnation: str,
        frontier: int,
        heard_first: int,
        counters: Counters,
        broken: bool = True,
        passed_cut: str = "",
    ) -> None:
        """Start at a frontier, with nothing received.

        Args:
            incarnation: of the body.
            frontier: number of the first record wanted.
            heard_first: number of the first record in the live stream.
            counters: of the body; updated here.
            broken: whether the first record does not continue what was taken before.
            passed_cut: id of the cut at the frontier, if it has been taken already.
        """
        self.incarnation = incarnation
        self.frontier = frontier
        self.newest = self._live_end = heard_first
        self.counters = counters
        self._counts_losses_from = heard_first  # older records may be long gone
        self._ready: deque[tuple[RecordBatch, bool]] = deque()
        self._ahead: list[RecordBatch] = []
        self._ready_bytes = self._ahead_bytes = 0
        self._gone: list[Range] = []
        self._lost_ahead: deque[Range] = deque()
        self._broken = broken
        self._asked: Range | None = None
        self._ask_from = self._awaited_since = 0.0
        self._patience = limits.FETCH_PATIENCE
        self._spoilt_answers = 0
        self._cut: tuple[Cut, int] | None = None
        self._passed_cut = passed_cut

    def arrived(self, batch: RecordBatch, live: bool, now: float = 0.0) -> None:
        """Receive records, from the live stream or fetched."""
        if batch.cut:
            self.note_cut(batch.cut, batch.first_sequence)
        if live:
            self._note_gap(batch)
        else:
            self.counters.fetched += len(batch)
            self._wait_for_rest(now)
        self.newest = max(self.newest, batch.end)
        place = bisect_left(self._ahead, batch.first_sequence, key=_first)
        here = place < len(self._ahead) and self._ahead[place].first_sequence == batch.first_sequence
        if batch.end <= self.frontier or here:
            self.counters.duplicates += len(batch)
        elif self._too_much(batch):
            self.counters.postponed += len(batch)
        else:
            self._ahead.insert(place, batch)
            self._ahead_bytes += _size(batch)
            self._advance()

    def _wait_for_rest(self, now: float) -> None:
        """Wait for the rest of an answer: the next part may take as long, plus some: slow lines need time."""
        if self._asked:
            as_long = min(3.0 * (now - self._awaited_since), limits.FETCH_LONGEST_PATIENCE)
            self._patience = max(limits.FETCH_PATIENCE, as_long)
            self._awaited_since, self._ask_from = now, max(self._ask_from, now + self._patience)

    def _note_gap(self, batch: RecordBatch) -> None:
        if batch.first_sequence > self._live_end:
            self.counters.gaps += 1
            self.counters.missed += batch.first_sequence - self._live_end
        self._live_end = max(self._live_end, batch.end)

    def _too_much(self, batch: RecordBatch) -> bool:
        if batch.first_sequence <= self.frontier:
            return self._ready_bytes >= limits.UNTAKEN_BYTES
        return self._ahead_bytes >= limits.AHEAD_BYTES

    def _advance(self) -> None:
        """Move the frontier past all records that are here or gone."""
        while True:
            if self._ahead and self._ahead[0].first_sequence <= self.frontier:
                self._accept(self._ahead.pop(0))
            elif not self._pass_gone():
                return

    def _accept(self, batch: RecordBatch) -> None:
        self._ahead_bytes -= _size(batch)
        skip = min(self.frontier - batch.first_sequence, len(batch))
        self.counters.duplicates += skip
        fresh = batch.tail(skip) if skip else batch
        if not len(fresh):
            return
        self._ready.append((fresh, not self._broken))
        self._ready_bytes += _size(fresh)
        self.frontier = fresh.end
        self._broken, self._counts_losses_from = False, 0

    def _pass_gone(self) -> bool:
        """Skip records at the frontier that are gone; return whether there were any."""
        self._gone = [part for part in self._gone if part[1] > self.frontier]
        ends = [end for first, end in self._gone if first <= self.frontier]
        if not ends:
            return False
        end = min([max(ends), *(batch.first_sequence for batch in self._ahead[:1])])
        first = max(self.frontier, self._counts_losses_from)
        if end > first:
            self.counters.lose(first, end)
            if self._ready:
                self._lost_ahead.append((first, end))
        self.frontier, self._broken = end, True
        return True

    def told(self, extent: Range) -> None:
        """Take in what the body retains: older records have left its ring, and there are no newer ones."""
        first, end = extent
        if end > self._live_end:
            self.counters.gaps += 1
            self.counters.missed += end - self._live_end
        self.newest, self._live_end = max(self.newest, end), max(self._live_end, end)  # the news may be outdated
        if first > self.frontier:
            self._gone.append((self.frontier, first))
            self._advance()

    def answered(self, ending: Fetched, now: float, spoilt: bool = False) -> None:
        """Take in the end of an answer: if it brought anything, the next request is due at once.

        What it says beyond the request is ignored, and so is a late answer to an earlier request.

        Args:
            ending: the end of the answer.
            now: monotonic time.
            spoilt: whether anything malformed has arrived since the request. A repetition would not be better.
        """
        if self._asked is None or ending.range[0] != self._asked[0]:
            return
        self._wait_for_rest(now)
        first, last = self._asked
        self._gone += [(begin, min(end, last)) for begin, end in ending.gone if begin < last and end > first]
        self._advance()
        useful = self.frontier > first
        self._spoilt_answers = self._spoilt_answers + 1 if spoilt and not useful else 0
        if self._spoilt_answers >= SPOILT_ANSWERS:
            self._spoilt_answers = 0
            end = self._ahead[0].first_sequence if self._ahead else min(ending.range[1], last)
            self._gone.append((self.frontier, end))
            self._advance()
        self._ask_from = now if useful else now + limits.FETCH_PAUSE
        self._asked = None

    def wish(self, now: float) -> Range | None:
        """Return the range to request now; None if nothing is missing, an answer is on its way, or much is waiting."""
        end = self._ahead[0].first_sequence if self._ahead else self.newest
        if end <= self.frontier or self._ready_bytes >= limits.UNTAKEN_BYTES // 2 or now < self._ask_from:
            return None
        if self._asked:  # no answer in time: it may be lost, or be slower still
            self._patience = min(2.0 * self._patience, limits.FETCH_LONGEST_PATIENCE)
        self._asked, self._awaited_since, self._ask_from = (self.frontier, end), now, now + self._patience
        self.counters.asked += 1
        return self._asked

    def take(self) -> tuple[RecordBatch, bool] | None:
        """Return the next records, and whether they continue the last ones; None if none are waiting, or at a cut."""
        if not self._ready or self.at_cut:
            return None
        batch, continues = self._ready.popleft()
        self._ready_bytes -= _size(batch)
        while self._lost_ahead and self._lost_ahead[0][1] <= batch.first_sequence:
            self._lost_ahead.popleft()
        return batch, continues

    @property
    def has_room(self) -> bool:
        """Whether so few records are waiting that more should be copied from shared memory."""
        return self._ready_bytes < limits.COPIED_AHEAD_BYTES

    @property
    def taken(self) -> int:
        """Number of the first record not taken yet."""
        return self._ready[0][0].first_sequence if self._ready else self.frontier

    @property
    def broken(self) -> bool:
        """Whether the next record to be taken does not continue the last taken one."""
        return not self._ready[0][1] if self._ready else self._broken

    @property
    def untaken(self) -> int:
        """Number of records that are in order, and have not been taken."""
        return sum(len(batch) for batch, _ in list(self._ready))

    @property
    def lost_ahead(self) -> int:
        """Number of records that count as lost, and come after what has been taken."""
        ahead = list(self._lost_ahead)  # atomic: the other thread may add to it
        return sum(end - first for first, end in ahead if first >= self.taken)

    def note_cut(self, cut: Cut, first: int) -> None:
        """Note a cut of the whole system before record `first`: nothing is taken beyond it until pass_cut().

        Of several the last one counts, in whatever order they are heard of: the saves of earlier ones were abandoned.
        """
        is_last = self._cut is None or first >= self._cut[1]
        if is_last and first >= self.taken and cut.checkpoint != self._passed_cut:
            self._cut = (cut, first)

    @property
    def at_cut(self) -> Cut | None:
        """Return the cut at which the stream stands: everything before it has been taken, and nothing after it."""
        return self._cut[0] if self._cut and self.taken >= self._cut[1] else None

    def pass_cut(self) -> None:
        """Continue beyond the cut."""
        if self._cut:
            self._passed_cut, self._cut = self._cut[0].checkpoint, None

    @property
    def last_cut(self) -> str:
        """Id of the cut at which the stream stands, or which it has passed last; empty if there was none."""
        return self._cut[0].checkpoint if self._cut and self.at_cut else self._passed_cut

    def died(self) -> None:
        """Note that the body has a new life: missing records of this one, and records after a cut, will not arrive."""
        self._cut = None
        self._gone.append((self.frontier, max(self.newest, self.frontier)))
        self._advance()

    @property
    def behind(self) -> int:
        """Number of existing records that are not in the buffer yet."""
        return max(0, self.newest - self.frontier) + self.untaken


def _size(batch: RecordBatch) -> int:
    return batch.nbytes + limits.BATCH_OVERHEAD_BYTES


def _first(batch: RecordBatch) -> int:
    return batch.first_sequence
