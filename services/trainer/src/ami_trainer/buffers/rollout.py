"""Rollout buffer: complete stretches of each body's records, each used once, in order."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ami_shared import limits
from ami_shared.errors import WireError
from ami_shared.records import RecordBatch
from ami_shared.wire import Array
from ami_trainer.buffers.columns import Columns, Form

GONE_AFTER_ROLLOUTS = 100
AWAY_AFTER_ROLLOUTS = 2


def most_in_a_batch(length: int) -> int:
    """Return the largest number of rollouts of `length` steps that one batch of records completes."""
    return 1 + -(-limits.BATCH_RECORDS // length)


@dataclass(frozen=True)
class Rollout:
    """length + 1 consecutive records of one body; the last one only has the reward and value for the one before.

    Attributes:
        columns: name → (length + 1, …), the record's own dtypes.
        follows: (length + 1,) bool: whether the record continues the segment of the previous one.
        endings: (length + 1,) uint8, see Ending.
        versions: (length + 1,) int64: of the policy that acted.
    """

    columns: Mapping[str, Array]
    follows: Array
    endings: Array
    versions: Array


class _Stretch:
    """Preallocated memory for one rollout."""

    def __init__(self, length: int, columns: Mapping[str, Array]) -> None:
        self.columns = {name: np.empty((length + 1, *new.shape[1:]), new.dtype) for name, new in columns.items()}
        self.follows = np.zeros(length + 1, np.bool_)
        self.endings = np.zeros(length + 1, np.uint8)
        self.versions = np.zeros(length + 1, np.int64)
        self.filled = 0

    def state(self) -> dict[str, Any]:
        """Return the records so far."""
        parts = {"follows": self.follows, "endings": self.endings, "versions": self.versions}
        columns = {name: column[: self.filled] for name, column in self.columns.items()}
        return {name: column[: self.filled] for name, column in parts.items()} | {"columns": columns}

    @classmethod
    def restored(cls, length: int, state: Mapping[str, Any]) -> _Stretch:
        """Return the memory for a rollout, with the records from a state."""
        stretch = cls(length, state["columns"])
        stretch.filled = n = len(state["follows"])
        for name, column in stretch.columns.items():
            column[:n] = state["columns"][name]
        stretch.follows[:n], stretch.endings[:n] = state["follows"], state["endings"]
        stretch.versions[:n] = state["versions"]
        return stretch

    def begin_with_last_of(self, other: _Stretch) -> None:
        """Continue where another one ended: its last record is this one's first."""
        for name, column in self.columns.items():
            column[0] = other.columns[name][-1]
        self.follows[0], self.endings[0], self.versions[0] = False, other.endings[-1], other.versions[-1]
        self.filled = 1


def _steps(records: int) -> int:
    """Return the number of steps whose rewards are in the first `records` records of a rollout."""
    return max(0, records - 1)


class _Body:
    """One body's stretch that is being filled, its full ones, and the segment of its last record.

    `added_at` is the number of records of all bodies when its last one was added.
    """

    def __init__(self, stretch: _Stretch, added_at: int = 0) -> None:
        self.stretch, self.added_at = stretch, added_at
        self.ready: deque[_Stretch] = deque()
        self.segment: tuple[str, int] | None = None


class RolloutBuffer:
    """Cuts every body's records into rollouts of `length` steps. Safe between the feeder and the training thread.

    If too many of a body's rollouts are waiting, the oldest is dropped and counted. While the policy stays the same,
    because nobody learns, more may wait: they do not become older.
    """

    def __init__(self, length: int, waiting: int | None = None) -> None:
        """Start empty; require() names the columns.

        Args:
            length: steps in a rollout.
            waiting: how many rollouts of each body may wait; None = most_in_a_batch().
        """
        self._length = length
        self._waiting: float = most_in_a_batch(length) if waiting is None else waiting
        self._pressing: float = min(self._waiting, most_in_a_batch(length))
        self._bodies: dict[str, _Body] = {}
        self._taken: list[_Stretch] = []
        self._free: list[_Stretch] = []
        self._columns = Columns(())
        self._lock = threading.Lock()
        self.records = self.overflowed = 0

    def keep_all(self) -> None:
        """Drop no rollouts: the bodies wait too."""
        self._waiting = self._pressing = math.inf

    def require(
        self, names: Sequence[str], forms: Mapping[str, Form] | None = None, choices: Sequence[int] | None = None
    ) -> None:
        """Define the records' columns that rollouts hold; see Columns."""
        self._columns = Columns(names, forms, choices)

    def add(self, batch: RecordBatch, continues: bool, model: str) -> None:
        """Add a body's new records.

        Args:
            batch: the records.
            continues: whether they follow the body's last ones without a gap.
            model: name of the policy, whose versions are kept.

        Raises:
            WireError: a column is missing or has another form, or an action is not one of the choices.
        """
        if model not in batch.versions:
            raise WireError(f"records of {batch.body} carry no version of {model}")
        columns = self._columns.of(batch)
        with self._lock:
            body = self._bodies.get(batch.body)
            if body is None:
                body = self._bodies[batch.body] = _Body(self._take_free(columns))
            if not continues:
                body.segment = None
            for n in range(len(batch)):
                self._add_one(batch, columns, n, body, model)
            self.records += len(batch)
            body.added_at = self.records
            self._forget_gone()

    def _forget_gone(self) -> None:
        """Drop the stretches of bodies that were silent while the others filled a hundred rollouts each."""
        for name in [name for name, body in self._bodies.items() if self._silent(body, GONE_AFTER_ROLLOUTS)]:
            gone = self._bodies.pop(name)
            self._free += [gone.stretch, *gone.ready]
            self.overflowed += self._length * len(gone.ready) + _steps(gone.stretch.filled)

    def _silent(self, body: _Body, rollouts: int) -> bool:
        """Return whether a body was silent while each of the others filled this many rollouts."""
        return body.added_at < self.records - rollouts * self._length * len(self._bodies)

    def _add_one(self, batch: RecordBatch, columns: Mapping[str, Array], n: int, body: _Body, model: str) -> None:
        stretch, at = body.stretch, body.stretch.filled
        segment = (batch.incarnation, int(batch.segments[n]))
        for name, column in stretch.columns.items():
            column[at] = columns[name][n]
        stretch.follows[at] = segment == body.segment
        stretch.endings[at] = batch.endings[n]
        stretch.versions[at] = batch.versions[model][n]
        stretch.filled += 1
        body.segment = segment
        if stretch.filled > self._length:
            body.stretch = self._take_free(columns)
            body.stretch.begin_with_last_of(stretch)
            body.ready.append(stretch)
            while len(body.ready) > self._room(body):
                self._free.append(body.ready.popleft())
                self.overflowed += self._length

    def _room(self, body: _Body) -> float:
        """Return how many rollouts may wait: if newer policies have acted since, no more than a batch may bring."""
        has_aged = body.ready[0].versions[-1] < body.ready[-1].versions[0]
        return self._pressing if has_aged else self._waiting

    def _take_free(self, columns: Mapping[str, Array]) -> _Stretch:
        stretch = self._free.pop() if self._free else _Stretch(self._length, columns)
        stretch.filled = 0
        return stretch

    def ready(self) -> bool:
        """Return whether rollouts of half of the bodies are waiting, not counting bodies silent for a while.

        It is also ready if one body has as many as one batch of records may bring, so that slow bodies do not make fast
        ones lose theirs.
        """
        with self._lock:
            if any(len(body.ready) >= self._pressing for body in self._bodies.values()):
                return True
            waits = sum(bool(body.ready) for body in self._bodies.values())
            others = sum(
                not body.ready and not self._silent(body, AWAY_AFTER_ROLLOUTS) for body in self._bodies.values()
            )
        return waits > 0 and waits >= others

    def take(self) -> list[Rollout]:
        """Return the oldest rollout of each body that has one; call release() when they have been used."""
        with self._lock:
            self._taken = [body.ready.popleft() for _, body in sorted(self._bodies.items()) if body.ready]
        return [Rollout(taken.columns, taken.follows, taken.endings, taken.versions) for taken in self._taken]

    def release(self) -> None:
        """Reuse the memory of the rollouts taken last."""
        with self._lock:
            self._free += self._taken
            self._taken = []

    def state(self) -> dict[str, Any]:
        """Return what restore() needs, without taken rollouts; arrays are views, which must be copied soon."""
        bodies = {
            name: {
                "stretch": body.stretch.state(),
                "ready": {str(n): stretch.state() for n, stretch in enumerate(body.ready)},
                "segment": list(body.segment) if body.segment else None,
            }
            for name, body in self._bodies.items()
        }
        counters = {"records": self.records, "overflowed": self.overflowed}
        return {"length": self._length, "bodies": bodies, **counters}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier buffer; rollouts of another length are dropped, and their steps counted.

        Raises:
            WireError: the records have other columns, or these have another form.
        """
        if state["length"] != self._length:
            self.restore_counts(state)
            return
        self.records, self.overflowed = int(state["records"]), int(state["overflowed"])
        for name, kept in state["bodies"].items():
            for stretch in (kept["stretch"], *kept.get("ready", {}).values()):
                self._columns.take_form(name, stretch["columns"])
        for name, kept in state["bodies"].items():
            body = self._bodies[name] = _Body(_Stretch.restored(self._length, kept["stretch"]), self.records)
            body.ready.extend(_Stretch.restored(self._length, full) for full in kept.get("ready", {}).values())
            body.segment = (str(kept["segment"][0]), int(kept["segment"][1])) if kept["segment"] else None

    def restore_counts(self, state: Mapping[str, Any]) -> None:
        """Take over the numbers of an earlier buffer, without its rollouts, whose steps are counted as overflowed."""
        kept = [
            stretch
            for body in state["bodies"].values()
            for stretch in (body["stretch"], *body.get("ready", {}).values())
        ]
        dropped = sum(_steps(len(stretch["follows"])) for stretch in kept)
        self.records, self.overflowed = int(state["records"]), int(state["overflowed"]) + dropped

    def statistics(self) -> Mapping[str, Any]:
        """Return fill, capacity and the number of records seen."""
        return {
            "kind": f"rollouts of {self._length} steps, used once",
            "fill": sum(body.stretch.filled for body in list(self._bodies.values())),
            "capacity": (self._length + 1) * max(1, len(self._bodies)),
            "waiting": sum(len(body.ready) for body in list(self._bodies.values())),
            "seen": self.records,
            "overflowed": self.overflowed,
        }
