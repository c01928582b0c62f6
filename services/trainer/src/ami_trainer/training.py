"""The training loop: gradient steps while there is something to learn; all else happens between two of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ami_shared.clock import Clock, Every
from ami_shared.gate import Gate
from ami_shared.metrics import Picture
from ami_trainer.trainers.trainer import Trainer

IDLE_WAIT_S = 0.5
PAUSED_LOOK_S = 0.2


class Pace(Protocol):
    """When training may begin."""

    def mark(self) -> None:
        """Note what there is to learn from; called before is_trainable()."""
        ...

    def may_train(self) -> bool:
        """Return whether training may begin now."""
        ...

    def settle(self) -> None:
        """Called when training may not begin, or nothing is left to learn from what there was at mark()."""
        ...


class Living:
    """The pace without lockstep: learn from everything at once; nobody waits."""

    def mark(self) -> None:
        """Do nothing: old and new records are not distinguished."""

    def may_train(self) -> bool:
        return True

    def settle(self) -> None:
        """Do nothing: nobody waits for this."""


class Training:
    """Runs one trainer from start to stop.

    Attributes:
        pace: may be replaced before run() only.
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
            trainer: to run.
            gate: tells what the controller wants.
            clock: tells the time.
            publish: called with the time after each gradient step, and at intervals when there are none; publishes the
                models if that is due, and returns whether it did.
            on_metrics: called with the step and its metrics.
            on_picture: called with the trainer's pictures.
            picture_interval_s: seconds between two pictures.
            metrics_interval_s: seconds between two calls of `on_metrics`.
            cut: called between two gradient steps, even while paused: takes the cut for a checkpoint if one is due.
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
        """Continue the counters of an earlier process."""
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
                    self._publish_if_due()  # otherwise the last steps of a burst would wait for the next one
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
                continue  # a skipped step, which is counted: the means are over the others
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
