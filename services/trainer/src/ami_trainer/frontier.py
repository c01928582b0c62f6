"""How far a trainer has a body's stream: in order, exactly once, what is missing fetched, or counted as lost.

Pure: takes what arrived and the time; tells what to take into the buffer and what to ask for.
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
SILENT_LIFE = 5.0  # seconds, after which a former life that is heard is the one that lives
SPOILT_ANSWERS = 3  # in a row, after which what they do not bring counts as lost


@dataclass
class Counters:
    """What happened to one body's records on their way here.

    Attributes:
        received: handed on to the buffer.
        lost: gone for good: left the body's ring, or died with the body, or did not fit the buffer.
        duplicates: came once more, and were refused.
        gaps: stretches that the live stream did not bring.
        missed: records in them.
        postponed: came when too much was waiting already; fetched later.
        fetched: came because they were asked for.
        asked: wishes sent to the body.
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
    """One incarnation's stream, from the first record wanted on.

    `frontier` is the first sequence number not accepted yet. What is accepted waits in order to be taken; what came
    ahead of a gap waits aside until the gap is filled. Each is bounded in bytes: what is too much is fetched later.
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
            frontier: number of the first record wanted.
            heard_first: number of the first record that the live stream brings.
            broken: whether the first record does not continue what was taken before.
            passed_cut: id of the cut that lies at the frontier, if it has been taken already.
        """
        self.incarnation = incarnation
        self.frontier = frontier
        self.newest = self._live_end = heard_first
        self.counters = counters
        self.losses: deque[Range] = deque(maxlen=REMEMBERED_LOSSES)
        self._counts_losses_from = heard_first  # what is older may be gone long since
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
        """Take in records, from the live stream or fetched."""
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
        """Part of an answer came: what follows may take as long, and some more. Slow lines are not asked twice."""
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
        """Move the frontier over all that is here, and over what is gone."""
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
        """Skip what is gone right at the frontier; return whether there was any."""
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
        """The body says what it retains: what is older has left its ring, and there is nothing newer."""
        first, end = extent
        if end > self._live_end:
            self.counters.gaps += 1
            self.counters.missed += end - self._live_end
        self.newest, self._live_end = max(self.newest, end), max(self._live_end, end)  # it may have been overtaken
        if first > self.frontier:
            self._gone.append((self.frontier, first))
            self._advance()

    def answered(self, ending: Fetched, now: float, spoilt: bool = False) -> None:
        """An answer has ended: ask on at once if it brought anything. What it says beyond the question is not heard,
        nor is an answer to an earlier question, which was slow to come.

        Args:
            spoilt: whether anything malformed came since the question. What a body retains will not get better.
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
        """Return what to ask for now; None while nothing is missing, an answer is on its way, or much waits."""
        end = self._ahead[0].first_sequence if self._ahead else self.newest
        if end <= self.frontier or self._ready_bytes >= limits.UNTAKEN_BYTES // 2 or now < self._ask_from:
            return None
        if self._asked:  # no answer came in time: it may have been lost, or is slower still
            self._patience = min(2.0 * self._patience, limits.FETCH_LONGEST_PATIENCE)
        self._asked, self._awaited_since, self._ask_from = (self.frontier, end), now, now + self._patience
        self.counters.asked += 1
        return self._asked

    def take(self) -> tuple[RecordBatch, bool] | None:
        """Return the next records in order, and whether they continue the last ones; None if none wait, or at a cut."""
        if not self._ready or self.at_cut:
            return None
        batch, continues = self._ready.popleft()
        self._ready_bytes -= _size(batch)
        while self._lost_ahead and self._lost_ahead[0][1] <= batch.first_sequence:
            self._lost_ahead.popleft()
        return batch, continues

    @property
    def has_room(self) -> bool:
        """Whether so little waits to be taken that more should be copied from where it lies safely."""
        return self._ready_bytes < limits.COPIED_AHEAD_BYTES

    @property
    def taken(self) -> int:
        """Number of the first record that has not been taken."""
        return self._ready[0][0].first_sequence if self._ready else self.frontier

    @property
    def broken(self) -> bool:
        """Whether the next record to be taken does not continue the last one that was."""
        return not self._ready[0][1] if self._ready else self._broken

    @property
    def untaken(self) -> int:
        """Records that are in order, and have not been taken."""
        return sum(len(batch) for batch, _ in list(self._ready))

    @property
    def lost_ahead(self) -> int:
        """Records that count as lost, and lie beyond what has been taken."""
        ahead = list(self._lost_ahead)  # at once: the other thread may add to it
        return sum(end - first for first, end in ahead if first >= self.taken)

    def note_cut(self, cut: Cut, first: int) -> None:
        """A cut of the whole system lies before record `first`: no more is to be taken there until pass_cut()."""
        if first >= self.taken and cut.checkpoint != self._passed_cut:
            self._cut = (cut, first)

    @property
    def at_cut(self) -> Cut | None:
        """The cut that everything before it has been taken of, and nothing after it."""
        return self._cut[0] if self._cut and self.taken >= self._cut[1] else None

    def pass_cut(self) -> None:
        """Go on beyond it."""
        if self._cut:
            self._passed_cut, self._cut = self._cut[0].checkpoint, None

    @property
    def last_cut(self) -> str:
        """Id of the cut that it stands at, or that it has passed last; empty where there was none."""
        return self._cut[0].checkpoint if self._cut and self.at_cut else self._passed_cut

    def died(self) -> None:
        """The body lives anew: what is missing of this life will not come, nor what follows a cut."""
        self._cut = None
        self._gone.append((self.frontier, max(self.newest, self.frontier)))
        self._advance()

    @property
    def behind(self) -> int:
        """Records that exist and are not in the buffer yet."""
        return max(0, self.newest - self.frontier) + self.untaken


class BodyStream:
    """All lives of one body. A new one follows the last; what comes late of a former one is refused.

    Attributes:
        unread: records that the body has told to lie in its memory, which is within reach, and that wait there.
        record_age_s: how old the newest record was when it came; None before the first one that came live.
    """

    def __init__(self, history: int) -> None:
        """Start before any life of the body has been heard.

        Args:
            history: how many records of the time before the first one heard are of use.
        """
        self._history = history
        self._former: OrderedDict[str, int] = OrderedDict()  # incarnation, and how far it was taken
        self._heard_at = 0.0
        self._untaken: deque[Life] = deque()
        self._refused_last = False
        self.counters = Counters()
        self.life: Life | None = None
        self.unread = 0
        self.record_age_s: float | None = None

    def arrived(self, batch: RecordBatch, live: bool, now: float = 0.0) -> bool:
        """Take in records, from the live stream or fetched; return whether they are of the present life."""
        life = self._life(batch.incarnation, batch.first_sequence, now)
        if life:
            life.arrived(batch, live, now)
        return life is not None

    def told(self, extent: Extent, now: float = 0.0) -> None:
        """Take in what the body says that it retains."""
        if life := self._life(extent.incarnation, extent.range[1], now):
            life.told(extent.range)
            if extent.cut:
                life.note_cut(*extent.cut)

    def answered(self, ending: Fetched, now: float, spoilt: bool = False) -> None:
        """Take in the end of an answer, and whether anything malformed came since the question."""
        if self.life and self.life.incarnation == ending.incarnation:
            self.life.answered(ending, now, spoilt)

    def _life(self, incarnation: str, heard_first: int, now: float) -> Life | None:
        """Return the present life; begin it where it is first heard of. None for a former one.

        A body that was cut off may come back after another has taken its name, and be taken for the one that follows
        until it hears that it is to end. The other is heard on then, while this one is silent: it goes on.
        """
        if self.life and self.life.incarnation == incarnation:
            self._heard_at = now
            return self.life
        if incarnation in self._former and now <= self._heard_at + SILENT_LIFE:
            return None
        if self.life:  # everything from birth on is missed, or from where a former life was left
            self.life.died()
            self._former[self.life.incarnation] = self.life.frontier
            first = self._former.pop(incarnation, 0)
            self.life = Life(incarnation, first, first, self.counters)
            while len(self._former) > REMEMBERED_LIVES:
                self._former.popitem(last=False)
        else:
            self.life = Life(incarnation, max(0, heard_first - self._history), heard_first, self.counters)
        self._heard_at = now
        self._untaken.append(self.life)
        return self.life

    @property
    def has_room(self) -> bool:
        """Whether more should be copied from where it lies safely."""
        return self.life is None or self.life.has_room

    @property
    def at_cut(self) -> Cut | None:
        """The cut of the whole system that this stream has reached, if it stands at one, and no former life's waits."""
        if not self.life or (self._untaken and self._untaken[0] is not self.life):
            return None
        return self.life.at_cut

    def pass_cut(self) -> None:
        """Go on beyond the cut."""
        if self.life:
            self.life.pass_cut()

    def state(self) -> dict[str, Any]:
        """Return what restore() needs to go on behind the last record that was taken.

        Where this process ends, what waits of a former life is lost: nobody could ask for it.
        """
        if not self.life:
            return {}
        of_former = sum(life.untaken for life in list(self._untaken) if life is not self.life)
        lost = self.counters.lost - self.life.lost_ahead + of_former
        return {
            "incarnation": self.life.incarnation,
            "frontier": self.life.taken,
            "broken": self.life.broken or self._refused_last,
            "passed_cut": self.life.last_cut,
            "counters": {**asdict(self.counters), "lost": lost},
        }

    def restore(self, state: Mapping[str, Any], broken: bool = False) -> None:
        """Go on where an earlier process stood.

        Args:
            state: of state(); with `behind`, how many more records there were, which are lost if another life follows.
            broken: whether the next record is not to continue the last one, whatever the state says.
        """
        self.counters = Counters(**state["counters"])
        frontier = int(state["frontier"])
        broken = broken or bool(state.get("broken"))
        passed_cut = str(state.get("passed_cut", ""))
        self.life = Life(str(state["incarnation"]), frontier, frontier, self.counters, broken, passed_cut)
        self.life.newest += int(state.get("behind", 0))
        self._untaken.append(self.life)

    def wish(self, now: float) -> tuple[str, Range] | None:
        """Return the incarnation and the range to ask for now; None while what waits in memory may hold it."""
        wanted = self.life.wish(now) if self.life and not self.unread else None
        return (self.life.incarnation, wanted) if self.life and wanted else None

    def take(self) -> tuple[RecordBatch, bool] | None:
        """Return the next records in order, and whether they continue the last ones without a gap; None if none wait.

        Say refuse() if they do not fit.
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
        """The records taken last did not fit the buffer after all: they are lost, and a gap."""
        self.counters.received -= len(batch)
        self.counters.lost += len(batch)
        self._refused_last = True

    @property
    def behind(self) -> int:
        """How many records exist that are not in the buffer yet."""
        return self.unread + (self.life.behind if self.life else 0)

    def statistics(self) -> dict[str, float]:
        """Return the counters, how many records exist that are not in the buffer yet, and the newest one's age."""
        age = {} if self.record_age_s is None else {"record_age_s": self.record_age_s}
        return {**asdict(self.counters), "behind": self.behind, **age}


def _size(batch: RecordBatch) -> int:
    return batch.nbytes + limits.BATCH_OVERHEAD_BYTES


def _first(batch: RecordBatch) -> int:
    return batch.first_sequence
