"""The base of trainers that learn from minibatches from a buffer, a fixed number per new record."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

from ami_shared.state import restore_each
from ami_trainer.data_parallel import Batch, Losses, Team
from ami_trainer.fresh_error import FreshError
from ami_trainer.limiter import UpdateLimiter
from ami_trainer.optimisation import GuardedOptimiser
from ami_trainer.trainers.trainer import PlainTrainer


class Buffer(Protocol):
    """What is needed of a buffer; `capacity` is in records."""

    @property
    def capacity(self) -> int: ...

    def __len__(self) -> int: ...

    def state(self) -> Mapping[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def statistics(self) -> Mapping[str, Any]: ...


B = TypeVar("B", bound=Buffer)


class MinibatchTrainer(PlainTrainer, ABC, Generic[B]):
    """Trains in bursts of gradient steps, as many as new records allow.

    Where records come one by one, a burst is short; measuring waits until a full burst's steps have been taken, so that
    it is not of a single record.
    """

    def __init__(
        self, buffer: B, optimiser: GuardedOptimiser, updates_per_record: float, burst: int, first_after: int
    ) -> None:
        """Take the parts that the concrete trainer has built.

        Args:
            buffer: of records.
            optimiser: of the trained modules.
            updates_per_record: gradient steps for each new record.
            burst: gradient steps between two measurements on fresh records.
            first_after: records in the buffer before training begins.
        """
        self._buffer, self._optimiser = buffer, optimiser
        self._limiter = UpdateLimiter(updates_per_record)
        self._burst, self._first_after = burst, first_after
        self._metrics: Mapping[str, float] = {}
        self._fresh_error = FreshError()
        self._measured_at: int | None = None
        self.updates = 0

    @abstractmethod
    def _minibatch(self) -> Batch | None:
        """Return the next minibatch, on the device; None if the records have just been dropped."""

    @abstractmethod
    def _losses(self, batch: Batch) -> Losses:
        """Return the mean losses over a minibatch, or a share of it; the one called `loss` is minimised."""

    @abstractmethod
    def _measure_fresh(self) -> dict[str, float]:
        """Return metrics on records not yet trained on; {} if there are none."""

    @property
    def history(self) -> int:
        return self._buffer.capacity

    def in_lockstep(self) -> None:
        self._limiter.save_all()

    def share(self, team: Team) -> None:
        self._optimiser.share(team, self._losses)

    def is_trainable(self) -> bool:
        return len(self._buffer) >= self._first_after and self._limiter.available() >= 1

    def train(self) -> Iterator[Mapping[str, float]]:
        fresh = self._measure_if_due()
        for _ in range(min(self._burst, self._limiter.available())):
            begin = time.perf_counter()
            if (minibatch := self._minibatch()) is None:
                return
            self._limiter.spend()
            metrics = self._optimiser.step_on(minibatch, self._losses) | fresh
            metrics["step_time_ms"] = (time.perf_counter() - begin) * 1e3
            self.updates += 1
            self._metrics = metrics
            yield metrics
            fresh = {}

    def _measure_if_due(self) -> dict[str, float]:
        if self._measured_at is not None and self.updates < self._measured_at + self._burst:
            return {}
        if fresh := self._measure_fresh():
            self._measured_at = self.updates
        return fresh

    def _parts(self) -> dict[str, Any]:
        return {"optimiser": self._optimiser, "buffer": self._buffer, "limiter": self._limiter}

    def state(self) -> Mapping[str, Any]:
        parts = {name: part.state() for name, part in self._parts().items()}
        told = {"fresh": self._fresh_error.state(), "measured_at": self._measured_at}
        return {**parts, "updates": self.updates, **told}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        self._fresh_error.restore(state["fresh"])
        self._measured_at = state.get("measured_at")
        restore_each(self._parts(), state)

    def statistics(self) -> Mapping[str, Any]:
        return {
            "updates": self.updates,
            "losses": {name: value for name, value in self._metrics.items() if "loss" in name},
            "fresh_error": self._fresh_error.statistics(),
            "buffer": self._buffer.statistics(),
            "limiter": {**self._limiter.statistics(), **self._optimiser.statistics()},
        }
