"""How far a trainer has received a body's stream, through all lives of the body, one after the other.

Pure: takes what has arrived and the time; returns what to take into the buffer and what to request.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ami_shared.checkpoints import Cut
from ami_shared.clock import Rate
from ami_shared.experience import Extent, Fetched, Range
from ami_shared.records import RecordBatch
from ami_trainer.life import Counters, Life

REMEMBERED_LIVES = 16
SILENT_LIFE = 5.0  # seconds of silence after which a former life that is heard again is the present one


class BodyStream:
    """All lives of one body. A new one follows the last; late records of a former one are refused.

    Attributes:
        unread: number of announced records that are waiting in the body's memory, which is within reach.
        record_age_s: age of the newest record on arrival, in seconds; None before the first live one.
        nbytes: of all records that arrived at this process, duplicates included.
        from_memory: number of records copied from the body's memory by this process.
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
        self.nbytes = self.from_memory = 0
        self._rate, self._catching_up = Rate(), Rate()

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
        first = self._former[incarnation] + counted
        if end > first:
            self._late[incarnation] = counted + end - first
            self.counters.lose(first, end)

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
        self._rate, self._catching_up = Rate(), Rate()  # the counts so far are an earlier process's
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
        self.counters.lose(batch.first_sequence, batch.end)
        self._refused_last = True

    @property
    def behind(self) -> int:
        """Number of existing records that are not in the buffer yet."""
        return self.unread + (self.life.behind if self.life else 0)

    def statistics(self, now: float) -> dict[str, float]:
        """Return what `ami status` shows of one body's stream; `now` is monotonic time."""
        age = {} if self.record_age_s is None else {"record_age_s": self.record_age_s}
        return {
            **asdict(self.counters),
            "behind": self.behind,
            "intake_rate_hz": self._rate.update(now, self.counters.received),
            "catch_up_hz": self._catching_up.update(now, self.counters.fetched),
            "bytes_received": self.nbytes,
            "records_from_memory": self.from_memory,
            **age,
        }
