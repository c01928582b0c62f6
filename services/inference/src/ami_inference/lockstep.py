"""Lockstep: after each window of steps the body waits until every trainer has learned all it can.

For proofs and for tests that give the same curve for the same seed. Otherwise a body never waits: see clock.Grid.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from typing import Protocol

from ami_shared.checkpoints import Cut
from ami_shared.clock import Every, Tick
from ami_shared.gate import Gate
from ami_shared.records import Record
from ami_shared.settled import Settled, is_window_end

log = logging.getLogger(__name__)

SAY_AFTER_S = 10.0
LOOK_S = 0.5  # after which it checks its conditions without having been woken


class Stream(Protocol):
    """What lockstep needs of the experience stream."""

    def put(self, record: Record) -> None: ...

    def cut(self, cut: Cut) -> None: ...

    def flush(self) -> None: ...


class Versions(Protocol):
    """What lockstep needs of the replicas."""

    def newest_versions(self) -> Mapping[str, int]: ...


class Lockstep:
    """A pace that waits for trainers: replaces the time grid, and counts records on their way to the stream."""

    interval_s = 0.0

    def __init__(
        self, window: int, trainers: Collection[str], incarnation: str, gate: Gate, stream: Stream, replicas: Versions
    ) -> None:
        """Start at the beginning of the first window.

        Args:
            window: steps between two waits.
            trainers: names of the trainers to wait for.
            incarnation: of this body.
            gate: tells of pauses and of the end.
            stream: takes the records.
            replicas: tell which versions are in use.
        """
        self._window, self._trainers, self._incarnation = window, frozenset(trainers), incarnation
        self._gate, self._stream, self._replicas = gate, stream, replicas
        self._settled: dict[str, Settled] = {}
        self._changed = threading.Condition()
        self._records = 0
        gate.on_wish = self._wake
        self.waited_s = 0.0
        self.moved_at = time.monotonic()

    def put(self, record: Record) -> None:
        """Pass a record on, and count it."""
        self._stream.put(record)
        self._records += 1

    def cut(self, cut: Cut) -> None:
        """Pass a cut on."""
        self._stream.cut(cut)

    @property
    def at_cut(self) -> bool:
        """Whether the body is between two windows, when all trainers have learned what they could."""
        return is_window_end(self._records, self._window)

    def go_on_as(self, incarnation: str, records: int) -> None:
        """Continue an earlier process's stream, after this many records."""
        self._incarnation, self._records = incarnation, records

    def heard(self, settled: Settled) -> None:
        """Take a trainer's notice. Thread-safe."""
        with self._changed:
            self._settled[settled.trainer] = settled
            self._changed.notify_all()

    def restart(self) -> None:
        """Do nothing: a pause does not affect the progress of trainers."""

    def wait(self) -> Tick:
        """Return at once within a window; at its end wait for all trainers, or for a pause or the end."""
        if self.at_cut:
            begin = self.moved_at = time.monotonic()
            self._stream.flush()
            self._wait_for_trainers(begin)
            self._note_waiting()
        return Tick(0.0, 0, False)

    def _note_waiting(self) -> float:
        """Add the time since the last look to the time waited; return the present time."""
        before, self.moved_at = self.moved_at, time.monotonic()
        self.waited_s += self.moved_at - before
        return self.moved_at

    def _wait_for_trainers(self, begin: float) -> None:
        said = Every(SAY_AFTER_S, now=begin)
        with self._changed:
            while (behind := self._behind()) and not ((wished := self._gate.desired).paused or wished.stopping):
                if wished.epoch != self._gate.condition.epoch:
                    self._gate.confirm("running", wished)  # a resume need not wait for the trainers
                self._changed.wait(LOOK_S)
                if said.due(self._note_waiting()):
                    log.info("lockstep: waiting for %s", ", ".join(sorted(behind)))

    def _behind(self) -> set[str]:
        """Return the trainers that have not learned from all records yet, or whose parameters are not here yet."""
        held = self._replicas.newest_versions()
        return {name for name in self._trainers if not self._through(self._settled.get(name), held)}

    def _through(self, settled: Settled | None, held: Mapping[str, int]) -> bool:
        if settled is None or settled.frontiers.get(self._incarnation, 0) < self._records:
            return False
        return all(held[model] >= version for model, version in settled.versions.items() if model in held)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
