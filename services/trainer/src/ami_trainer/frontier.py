"""How far a trainer has received a body's stream: in order, exactly once; gaps are fetched, or counted as lost.

Pure: takes what has arrived and the time; returns what to take into the buffer and what to request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ami_shared import limits
from ami_shared.checkpoints import Cut
from ami_shared.experience import Extent, Fetched, Range
from ami_shared.records import RecordBatch

REMEMBERED_LIVES = 16
REMEMBERED_LOSSES = 16
SILENT_LIFE = 5.0  # seconds of silence after which a former life that is heard again is the present one
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
    """

    received: int = 0
    lost: int = 0
    duplicates: int = 0
    gaps: int = 0
    missed: int = 0
    postponed: int = 0
    fetched: int = 0
    asked: int = 0


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
        self.losses: deque[Range] = deque(maxlen=REMEMBERED_LOSSES)
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
            self.counters.lost += end - first
            self.losses.append((first, end))
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
        """Note a cut of the whole system before record `first`: nothing is taken beyond it until pass_cut()."""
        if first >= self.taken and cut.checkpoint != self._passed_cut:
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


class BodyStream:
    """All lives of one body. A new one follows the last; late records of a former one are refused.

    Attributes:
        unread: number of announced records that are waiting in the body's memory, which is within reach.
        record_age_s: age of the newest record on arrival, in seconds; None before the first live one.
    """

    def __init__(self, history: int) -> None:
        """Start before any life of the body has been heard.

        Args:
            history: how many records before the first one heard are useful.
        """
        self._history = history
        self._former: OrderedDict[str, int] = OrderedDict()  # incarnation → number of the first record not taken
        self._late: dict[str, int] = {}  # former incarnation → records of it that came since, and count as lost
        self._heard_at = 0.0
        self._untaken: deque[Life] = deque()
        self._refused_last = False
        self.counters = Counters()
        self.life: Life | None = None
        self.unread = 0
        self.record_age_s: float | None = None

    def arrived(self, batch: RecordBatch, live: bool, now: float = 0.0) -> bool:
        """Receive records, from the live stream or fetched; return whether they are of the present life."""
        life = self._life(batch.incarnation, batch.first_sequence, now)
        if life:
            life.arrived(batch, live, now)
        else:
            self._count_late(batch.incarnation, batch.end)
        return life is not None

    def told(self, extent: Extent, now: float = 0.0) -> None:
        """Take in what the body retains."""
        if life := self._life(extent.incarnation, extent.range[1], now):
            life.told(extent.range)
            if extent.cut:
                life.note_cut(*extent.cut)
        else:
            self._count_late(extent.incarnation, extent.range[1])

    def _count_late(self, incarnation: str, end: int) -> None:
        """Count the records of a former life before `end` that have not been counted yet as lost."""
        counted = self._late.get(incarnation, 0)
        more = max(0, end - self._former[incarnation] - counted)
        self._late[incarnation] = counted + more
        self.counters.lost += more

    def answered(self, ending: Fetched, now: float, spoilt: bool = False) -> None:
        """Take in the end of an answer, and whether anything malformed has arrived since the request."""
        if self.life and self.life.incarnation == ending.incarnation:
            self.life.answered(ending, now, spoilt)

    def _life(self, incarnation: str, heard_first: int, now: float) -> Life | None:
        """Return the present life; begin it when it is first heard of. None for a former one.

        A body that was cut off may return after another has taken its name, and be taken for the successor until it is
        told to end. When it falls silent and the other is still heard, the other one continues.
        """
        if self.life and self.life.incarnation == incarnation:
            self._heard_at = now
            return self.life
        if incarnation in self._former and now <= self._heard_at + SILENT_LIFE:
            return None
        if self.life:  # everything since its beginning is missing, or since a former life was left
            self.life.died()
            self._former[self.life.incarnation] = self.life.frontier
            first = self._former.pop(incarnation, 0)
            self.counters.lost -= self._late.pop(incarnation, 0)  # they are fetched now
            self.life = Life(incarnation, first, first, self.counters)
            while len(self._former) > REMEMBERED_LIVES:
                self._late.pop(self._former.popitem(last=False)[0], None)
        else:
            self.life = Life(incarnation, max(0, heard_first - self._history), heard_first, self.counters)
        self._heard_at = now
        self._untaken.append(self.life)
        return self.life

    @property
    def has_room(self) -> bool:
        """Whether more should be copied from shared memory."""
        return self.life is None or self.life.has_room

    @property
    def at_cut(self) -> Cut | None:
        """Return the cut of the whole system at which this stream stands, if no former life has records waiting."""
        if not self.life or (self._untaken and self._untaken[0] is not self.life):
            return None
        return self.life.at_cut

    def pass_cut(self) -> None:
        """Go on beyond the cut."""
        if self.life:
            self.life.pass_cut()

    def state(self) -> dict[str, Any]:
        """Return what restore() needs to continue after the last taken record.

        Where this process ends, what waits of a former life is lost: nobody could ask for it.
        """
        present = self.life  # read once: another may begin while a save reads this
        if not present:
            return {}
        of_former = sum(life.untaken for life in list(self._untaken) if life is not present)
        lost = self.counters.lost - present.lost_ahead + of_former
        return {
            "incarnation": present.incarnation,
            "frontier": present.taken,
            "broken": present.broken or self._refused_last,
            "passed_cut": present.last_cut,
            "counters": {**asdict(self.counters), "lost": lost},
        }

    def restore(self, state: Mapping[str, Any], broken: bool = False) -> None:
        """Continue where an earlier process stopped.

        Args:
            state: from state(); `behind` is the number of later records, which are lost if another life follows.
            broken: whether the next record does not continue the last one, whatever the state says.
        """
        self.counters = Counters(**state["counters"])
        frontier = int(state["frontier"])
        broken = broken or bool(state.get("broken"))
        passed_cut = str(state.get("passed_cut", ""))
        self.life = Life(str(state["incarnation"]), frontier, frontier, self.counters, broken, passed_cut)
        self.life.newest += int(state.get("behind", 0))
        self._untaken.append(self.life)

    def wish(self, now: float) -> tuple[str, Range] | None:
        """Return the incarnation and the range to request now; None while records waiting in memory may contain it."""
        wanted = self.life.wish(now) if self.life and not self.unread else None
        return (self.life.incarnation, wanted) if self.life and wanted else None

    def take(self) -> tuple[RecordBatch, bool] | None:
        """Return the next records, and whether they continue the last ones without a gap; None if none are waiting.

        Call refuse() if they do not fit.
        """
        while self._untaken:
            if taken := self._untaken[0].take():
                batch, continues = taken
                self.counters.received += len(batch)
                refused, self._refused_last = self._refused_last, False
                return batch, continues and not refused
            if self._untaken[0] is self.life:
                return None
            self._untaken.popleft()
        return None

    def refuse(self, batch: RecordBatch) -> None:
        """Note that the records taken last did not fit the buffer: they are lost, and leave a gap."""
        self.counters.received -= len(batch)
        self.counters.lost += len(batch)
        self._refused_last = True

    @property
    def behind(self) -> int:
        """Number of existing records that are not in the buffer yet."""
        return self.unread + (self.life.behind if self.life else 0)

    def statistics(self) -> dict[str, float]:
        """Return the counters, the number of existing records not in the buffer yet, and the newest one's age."""
        age = {} if self.record_age_s is None else {"record_age_s": self.record_age_s}
        return {**asdict(self.counters), "behind": self.behind, **age}


def _size(batch: RecordBatch) -> int:
    return batch.nbytes + limits.BATCH_OVERHEAD_BYTES


def _first(batch: RecordBatch) -> int:
    return batch.first_sequence
