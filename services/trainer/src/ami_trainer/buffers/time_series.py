"""Time-series buffer: the newest records of each body in order, sampled as windows within one segment."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ami_shared.records import RecordBatch
from ami_shared.wire import Array
from ami_trainer.buffers.columns import Columns, Form


class _Ring:
    """The newest records of one body. `runs[i]` counts the records of the segment up to and including slot i.

    `added_at` is the number of records of all bodies when the last one was added.
    """

    def __init__(self, capacity: int, columns: Mapping[str, Array]) -> None:
        self.columns = {name: np.empty((capacity, *column.shape[1:]), column.dtype) for name, column in columns.items()}
        self.runs = np.zeros(capacity, np.int64)
        self.total = self.added_at = 0
        self.segment: tuple[str, int] | None = None

    def add(self, columns: Mapping[str, Array], n: int, segment: tuple[str, int]) -> None:
        slot = self.total % len(self.runs)
        for name, column in self.columns.items():
            column[slot] = columns[name][n]
        before = self.runs[slot - 1] if segment == self.segment else 0
        self.runs[slot] = before + 1
        self.segment = segment
        self.total += 1

    def state(self) -> dict[str, Any]:
        """Return the slots in use, in the order of memory."""
        columns = {name: column[: self.filled] for name, column in self.columns.items()}
        segment = list(self.segment) if self.segment else None
        return {"columns": columns, "runs": self.runs[: self.filled], "total": self.total, "segment": segment}

    @classmethod
    def restored(cls, capacity: int, state: Mapping[str, Any]) -> _Ring:
        """Return a ring of this capacity with the newest records of an earlier one."""
        ring = cls(capacity, state["columns"])
        total, kept = int(state["total"]), len(state["runs"])
        newest = np.arange(total - min(kept, capacity), total)
        ring.total = total if kept in (total, capacity) or kept > capacity else kept
        slots = (newest - total + ring.total) % capacity
        for name, column in ring.columns.items():
            column[slots] = state["columns"][name][newest % max(1, kept)]
        ring.runs[slots] = state["runs"][newest % max(1, kept)]
        ring.segment = (str(state["segment"][0]), int(state["segment"][1])) if state["segment"] else None
        return ring

    @property
    def filled(self) -> int:
        return min(self.total, len(self.runs))

    def ends(self, length: int) -> Array:
        """Return the places, (n,) int64 counted from the oldest record, where a window of `length` records can end."""
        places = np.arange(length - 1, self.filled)
        return places[self.runs[self.slots(places)] >= length]

    def slots(self, places: Array) -> Array:
        """Return the slots of places, which are counted from the oldest record."""
        oldest = self.total - self.filled
        return (oldest + places) % len(self.runs)


class TimeSeriesBuffer:
    """Keeps the newest `capacity` records of each body. Safe between the feeder and the training thread.

    A window consists of consecutive records of one segment of one body.
    """

    def __init__(
        self,
        capacity: int,
        names: Sequence[str],
        seed: int = 0,
        forms: Mapping[str, Form] | None = None,
        choices: Sequence[int] | None = None,
    ) -> None:
        """Start empty; memory is allocated with each body's first records.

        Args:
            capacity: number of records kept of each body.
            names: of the records' columns to keep.
            seed: of the random choices.
            forms: see Columns (required).
            choices: see Columns.
        """
        self.capacity = capacity
        self._columns = Columns(names, forms, choices)
        self._rings: dict[str, _Ring] = {}
        self._fresh: dict[str, int] = {}
        self._fresh_taken = 0
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.seen = 0

    def __len__(self) -> int:
        return sum(ring.filled for ring in list(self._rings.values()))

    def add(self, batch: RecordBatch, continues: bool) -> None:
        """Add a body's new records.

        Args:
            batch: the records.
            continues: whether they follow the body's last ones without a gap.

        Raises:
            WireError: a column is missing or has another form, or an action is not one of the choices.
        """
        columns = self._columns.of(batch)
        with self._lock:
            ring = self._rings.get(batch.body)
            if ring is None:
                ring = self._rings[batch.body] = _Ring(self.capacity, columns)
            if not continues:
                ring.segment = None
            for n in range(len(batch)):
                ring.add(columns, n, (batch.incarnation, int(batch.segments[n])))
            self.seen += len(batch)
            ring.added_at = self.seen
            self._forget_gone()

    def _forget_gone(self) -> None:
        """Drop the records of bodies that have been silent while the others could have filled their rings."""
        long_ago = self.seen - self.capacity * len(self._rings)
        for body in [body for body, ring in self._rings.items() if ring.added_at < long_ago]:
            del self._rings[body]
            self._fresh.pop(body, None)

    def column(self, name: str) -> Array:
        """Return one column of all records, (n, …), in no particular order."""
        with self._lock:
            return np.concatenate([ring.columns[name][: ring.filled] for ring in self._rings.values()])

    def windows(self, length: int) -> int:
        """Return the number of windows of `length` records."""
        with self._lock:
            return sum(len(ring.ends(length)) for ring in self._rings.values())

    def sample(self, count: int, length: int) -> dict[str, Array] | None:
        """Return `count` random windows, drawn with replacement: name → (count, length, …); None if there is none.

        They exclude records that take_fresh() has not passed yet, as long as there are others.
        """
        with self._lock:
            rings = list(self._rings.values())
            ends = [ring.ends(length) for ring in rings]
            passed = [self._fresh.get(body, 0) - ring.total + ring.filled for body, ring in self._rings.items()]
            not_fresh = [places[places < end] for places, end in zip(ends, passed, strict=True)]
            ends = not_fresh if any(map(len, not_fresh)) else ends
            counts = np.array([len(places) for places in ends])
            if counts.sum() == 0:
                return None
            chosen = self._random.integers(counts.sum(), size=count)
            which = np.searchsorted(np.cumsum(counts), chosen, side="right")
            within = chosen - (np.cumsum(counts) - counts)[which]
            return _windows([(rings[r], int(ends[r][w])) for r, w in zip(which, within, strict=True)], length)

    def newest(self, length: int) -> dict[str, Array] | None:
        """Return the newest window of any body, name → (1, length, …); None if there is none."""
        with self._lock:
            for ring in sorted(self._rings.values(), key=lambda ring: ring.added_at, reverse=True):
                if len(ends := ring.ends(length)):
                    return _windows([(ring, int(ends[-1]))], length)
        return None

    def take_fresh(self, length: int, at_most: int) -> dict[str, Array] | None:
        """Return adjacent windows of records that no earlier call has returned: name → (n, length, …); None if none.

        The newest of each body come first, then the ones before, `at_most` in all; others are skipped. If there are
        more bodies than that, they take turns. Records wait until they fill a window.
        """
        with self._lock:
            fresh: list[tuple[int, _Ring, int]] = []  # each body's newest is 0, the one before 1, …
            turn = self._fresh_taken % max(1, len(self._rings))
            self._fresh_taken += at_most
            bodies = list(self._rings.items())
            for body, ring in (*bodies[turn:], *bodies[:turn]):
                oldest = ring.total - ring.filled
                ends = ring.ends(length)
                ends = ends[ends >= self._fresh.get(body, 0) - oldest + length - 1][::-length][:at_most]
                if len(ends):
                    fresh += [(n, ring, int(end)) for n, end in enumerate(ends)]
                    self._fresh[body] = oldest + int(ends[0]) + 1
            newest = sorted(fresh, key=lambda window: window[0])[:at_most]
            return _windows([(ring, end) for _, ring, end in newest], length) if newest else None

    def state(self) -> dict[str, Any]:
        """Return what restore() needs; arrays are views, which must be copied before anything is added."""
        return {
            "bodies": {body: ring.state() for body, ring in self._rings.items()},
            "fresh": dict(self._fresh),
            "seen": self.seen,
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the records of an earlier buffer; if not all fit, the newest.

        Raises:
            WireError: they have other columns, or these have another form.
        """
        for body, kept in state["bodies"].items():
            self._columns.take_form(body, kept["columns"])
        self._rings = {body: _Ring.restored(self.capacity, kept) for body, kept in state["bodies"].items()}
        renumbered = {body: int(kept["total"]) - self._rings[body].total for body, kept in state["bodies"].items()}
        self._fresh = {body: max(0, int(n) - renumbered.get(body, 0)) for body, n in state["fresh"].items()}
        self.seen = int(state["seen"])
        for ring in self._rings.values():
            ring.added_at = self.seen
        self._random.bit_generator.state = state["random"]

    def statistics(self) -> Mapping[str, Any]:
        """Return fill, capacity and the number of records seen."""
        return {
            "kind": "newest records in order",
            "fill": len(self),
            "capacity": self.capacity * max(1, len(self._rings)),
            "seen": self.seen,
        }


def _windows(chosen: Sequence[tuple[_Ring, int]], length: int) -> dict[str, Array]:
    """Return the windows that end at the given places of rings: name → (number of windows, length, …)."""
    columns = chosen[0][0].columns
    made = {name: np.empty((len(chosen), length, *of.shape[1:]), of.dtype) for name, of in columns.items()}
    for n, (ring, end) in enumerate(chosen):
        slots = ring.slots(np.arange(end - length + 1, end + 1))
        for name, column in ring.columns.items():
            column.take(slots, axis=0, out=made[name][n], mode="clip")  # all slots are valid; "raise" would copy twice
    return made
