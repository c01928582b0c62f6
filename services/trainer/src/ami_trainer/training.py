"""The training loop: gradient steps while there is something to learn; everything else happens between two of them."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ami_shared.clock import Clock, Every
from ami_shared.gate import Gate
from ami_shared.metrics import Picture
from ami_trainer.trainers.trainer import Trainer

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
PAUSED_LOOK_S = 0.2


class Pace(Protocol):
    """When training may begin."""

    def mark(self) -> None:
        """Called before the trainer is asked whether it is trainable."""
        ...

    def may_train(self) -> bool:
        """Whether training may begin now."""
        ...

    def settle(self) -> None:
        """Called when it may not, or there is nothing left to be learned from what was there at the mark."""
        ...


class Living:
    """Whatever is there is learned from, and nobody waits."""

    def mark(self) -> None:
        """What is there now is not told from what comes."""

    def may_train(self) -> bool:
        return True

    def settle(self) -> None:
        """Nobody is told."""


class Training:
    """Runs one trainer from start to stop.

    Attributes:
        pace: to be exchanged before run() only.
    """

    def __init__(
        self,
        trainer: Trainer,
        gate: Gate,
        clock: Clock,
        publish: Callable[[float], bool],
        on_metrics: Callable[[int, Mapping[str, float]], None],
        on_picture: Callable[[Picture], None],
        picture_interval_s: float,
        metrics_interval_s: float,
        cut: Callable[[], None] = lambda: None,
    ) -> None:
        """Wire the loop; run() starts it.

        Args:
            publish: told the time after each gradient step, and after the last one now and then; publishes the models
                if that is due, and tells whether it did.
            picture_interval_s, metrics_interval_s: seconds between two pictures, and between two calls of `on_metrics`.
            cut: called between two gradient steps, also while paused: takes the cut for a checkpoint if one is due.
        """
        self._trainer, self._gate, self._clock = trainer, gate, clock
        self.pace: Pace = Living()
        self._cut = cut
        gate.on_wish = self.new_data
        self._publish, self._on_metrics, self._on_picture = publish, on_metrics, on_picture
        now = clock.monotonic()
        self._picture_due = Every(picture_interval_s, min(30.0, picture_interval_s), now)
        self._metrics_due = Every(metrics_interval_s, 0.0, now)
        self._data = threading.Event()
        self._sums: dict[str, tuple[float, int]] = {}
        self.moved_at = now
        self.updates = self._published = 0
        self.waited_s = 0.0

    def new_data(self) -> None:
        """Wake the loop: is_trainable() or the controller's wish may have changed."""
        self._data.set()

    def state(self) -> Mapping[str, Any]:
        """Return what restore() needs."""
        return {"updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting where an earlier process stood."""
        self.updates = int(state["updates"])

    def run(self) -> None:
        """Train until the gate is closed."""
        self._publish_if_due()
        while self._pass_gate():
            self._data.clear()
            self.pace.mark()
            if self.pace.may_train() and self._trainer.is_trainable():
                self._burst()
            else:
                self.pace.settle()
                if self.updates > self._published:
                    self._publish_if_due()  # else the end of a burst would wait for the next one
                self._idle()

    def _publish_if_due(self) -> None:
        if self._publish(self._clock.monotonic()):
            self._published = self.updates

    def _idle(self) -> None:
        begin = self._clock.monotonic()
        self._data.wait(IDLE_WAIT_S)
        self.waited_s += self._clock.monotonic() - begin

    def _burst(self) -> None:
        steps = iter(self._trainer.train())
        for metrics in steps:
            self.updates += 1
            self._between_steps(metrics)
            if not self._pass_gate():
                break

    def _between_steps(self, metrics: Mapping[str, float]) -> None:
        now = self._clock.monotonic()
        for name, value in metrics.items():
            if not math.isfinite(value):
                continue  # of a skipped step, which is counted: the means are those of the others
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)
        if self._metrics_due.due(now):
            self._on_metrics(self.updates, {name: total / n for name, (total, n) in self._sums.items()})
            self._sums.clear()
        self._publish_if_due()
        if self._picture_due.due(now) and (picture := self._trainer.picture()):
            self._on_picture(picture)

    def _pass_gate(self) -> bool:
        """Wait while the system is paused; return whether to go on."""
        self.moved_at = self._clock.monotonic()
        self._cut()
        desired = self._gate.desired
        while desired.paused and not desired.stopping:
            self._gate.confirm("paused", desired)
            self._gate.wait_for_change(desired, timeout_s=PAUSED_LOOK_S)
            self.moved_at = self._clock.monotonic()
            self._cut()
            desired = self._gate.desired
        if not desired.stopping:
            self._gate.confirm("running", desired)
        return not desired.stopping
