"""The interaction loop: observe, decide, act, record; ten times a second, for months.

It waits for nothing but its time grid: records go to a queue, parameters are exchanged by swapping references, and the
controller's wish is read from the gate.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ami_inference.agents.agent import Agent
from ami_inference.environments.environment import Environment
from ami_inference.sensors.sensor import Observation
from ami_shared.checkpoints import Cut
from ami_shared.clock import Clock, Every, Tick
from ami_shared.errors import NotFiniteError, SensorLostError
from ami_shared.gate import Gate
from ami_shared.models.replicas import Replicas
from ami_shared.records import Record
from ami_shared.state import Restorable, Tree, copied, restore_each, state_of

REMEMBERED_TICKS = 6_000
PAUSED_LOOK_S = 0.2
BLIND_LOOK_S = 0.05  # between two looks of a body that sees nothing, if it has no time grid
STALL_S, STALL_STEPS = 1.0, 5.0


class Pace(Protocol):
    """When the next step is due: the time grid, or lockstep with the trainers."""

    interval_s: float

    @property
    def at_cut(self) -> bool:
        """Whether a cut of the whole system may be taken here."""
        ...

    def wait(self) -> Tick: ...

    def restart(self) -> None: ...


class RecordSink(Protocol):
    """Where finished records go."""

    def put(self, record: Record) -> None: ...

    def cut(self, cut: Cut) -> None: ...


def longest_stall(interval_s: float, max_silence_s: float) -> float:
    """Return how late a step may be, in seconds, without ending its segment.

    Args:
        interval_s: seconds between two steps.
        max_silence_s: seconds without an action after which the actuator releases all controls.
    """
    if not interval_s:
        return max_silence_s
    return max(interval_s, min(max(STALL_S, STALL_STEPS * interval_s), max_silence_s - interval_s))


class Interaction:
    """One body's life, from start to stop."""

    def __init__(
        self,
        environment: Environment,
        agent: Agent,
        replicas: Replicas,
        sink: RecordSink,
        gate: Gate,
        pace: Pace,
        clock: Clock,
        on_metrics: Callable[[int, dict[str, float]], None] = lambda step, values: None,
        metrics_interval_s: float = 10.0,
        on_cut: Callable[[Cut, Mapping[str, Tree]], None] = lambda cut, trees: None,
    ) -> None:
        """Wire the loop; run() starts it.

        Args:
            environment: to live in.
            agent: decides.
            replicas: the agent's models; swapped between two steps.
            sink: takes the records.
            gate: tells what the controller wants.
            pace: when the next step is due.
            clock: tells the time.
            on_metrics: called with the step and its metrics.
            metrics_interval_s: seconds between two calls of `on_metrics`, unless an episode ends.
            on_cut: called with this body's state as of a requested cut.
        """
        self._environment, self._agent, self._replicas = environment, agent, replicas
        self._sink, self._gate, self._pace, self._clock = sink, gate, pace, clock
        self._on_metrics, self._on_cut = on_metrics, on_cut
        self._wished_cut: Cut | None = None
        self._metrics_due = Every(metrics_interval_s, now=clock.monotonic())
        self._rest_due = Every(1.0, now=clock.monotonic())
        self._segment = -1
        self._segment_open = self._swapped = False
        self._stretch: int | None = None
        self._blind: str | None = None
        self._slept_s = clock.slept_s()
        self._world_waits = bool(getattr(environment, "waits", False))
        self._most_late_s = longest_stall(pace.interval_s, getattr(environment, "max_silence_s", math.inf))
        self._latenesses: deque[float] = deque(maxlen=REMEMBERED_TICKS)
        self.moved_at = clock.monotonic()
        self.steps = self.late_ticks = self.skipped_ticks = self.blind_ticks = self.not_finite = 0
        self._first_step = 0
        self._seamless = False

    def run(self) -> None:
        """Run until the gate is closed. Whatever happens, the environment is left at rest."""
        # A receiving thread must not hold the interpreter for 5 ms of a tick; below 1 ms, Windows would busy-wait.
        sys.setswitchinterval(0.001 if os.name == "nt" else 0.0005)
        try:
            self._environment.rest()
            self._pace.restart()
            self.moved_at = self._clock.monotonic()
            while not self._gate.stopping:
                if self._gate.desired.paused:
                    self._pause()
                    continue
                self._tick(self._pace.wait())
        finally:
            self._environment.rest()

    def _tick(self, tick: Tick) -> None:
        moved_before_at, self.moved_at = self.moved_at, self._clock.monotonic()
        self._count(tick)
        if self._has_stalled(tick.lateness_s if self._pace.interval_s else self.moved_at - moved_before_at):
            self._segment_open = False  # controls were released, or held for an unknown time
        desired = self._gate.desired
        if desired.paused or desired.stopping:
            return
        if self._wished_cut and self._pace.at_cut:
            self._take_cut()
        self._swapped |= self._replicas.swap()
        try:
            observation = self._environment.observe()
            self._see(observation)
            self._step(observation, tick)
        except SensorLostError as error:
            self.blind_ticks += 1
            self.not_finite += isinstance(error, NotFiniteError)
            self._go_blind(str(error))
            self._gate.confirm("blind", desired)
            if not self._pace.interval_s:
                self._gate.wait_for_change(desired, timeout_s=BLIND_LOOK_S)
            return
        self._blind = None
        self._gate.confirm("running", desired)

    def _has_stalled(self, late_s: float) -> bool:
        """Return whether the world has continued for long without this body; not if it waits for the body."""
        slept_before_s, self._slept_s = self._slept_s, self._clock.slept_s()
        stalled = late_s > self._most_late_s or self._slept_s > slept_before_s + STALL_S
        return stalled and not self._world_waits

    def _step(self, observation: Observation, tick: Tick) -> None:
        now, ending = self._clock.time(), observation.ending
        decision = self._agent.step(observation)
        if not ending:
            self._environment.act(decision.action)
        about = (self._segment, self.sequence, now, tick.lateness_s, self._replicas.versions)
        self._sink.put(Record(*about, decision.record, ending, self._swapped))
        self._swapped = False
        self.steps += 1
        if ending:
            self._segment_open = False
            self._on_metrics(self.steps, dict(self._environment.metrics()))
        if self._metrics_due.due(self.moved_at):
            self._on_metrics(self.steps, self._metrics(observation))

    @property
    def sequence(self) -> int:
        """Number of the next record within the incarnation."""
        return self.steps - self._first_step

    def wish_cut(self, cut: Cut) -> None:
        """Request a cut of the whole system before the next step, or while the body stands still. Thread-safe."""
        self._wished_cut = cut

    def _take_cut(self) -> None:
        cut, self._wished_cut = self._wished_cut, None
        assert cut is not None
        trees = {name: copied(state_of(part)) for name, part in self._remembering().items()}
        self._sink.cut(cut)
        self._on_cut(cut, trees)

    def _remembering(self) -> dict[str, Any]:
        return {"agent": self._agent, "environment": self._environment, "loop": self}

    def state(self) -> dict[str, Any]:
        """Return the loop's own counters."""
        return {
            "steps": self.steps,
            "first_step": self._first_step,
            "segment": self._segment,
            "segment_open": self._segment_open,
            "late_ticks": self.late_ticks,
            "skipped_ticks": self.skipped_ticks,
            "blind_ticks": self.blind_ticks,
            "not_finite": self.not_finite,
        }

    def restore(self, state: Tree) -> None:
        """Continue the counters of an earlier process; records are numbered from 0 again, as in every incarnation."""
        self.steps = self._first_step = int(state["steps"])
        self.late_ticks, self.skipped_ticks = int(state["late_ticks"]), int(state["skipped_ticks"])
        self.blind_ticks, self.not_finite = int(state.get("blind_ticks", 0)), int(state.get("not_finite", 0))

    def restore_all(self, trees: Mapping[str, Tree], seamless: bool) -> None:
        """Take over the state of an earlier process, before run().

        Args:
            trees: name → state, as given to on_cut.
            seamless: continue the segment, if the world continues, and the numbers of the same incarnation.

        Raises:
            WireError: something does not fit; the rest has been restored.
        """
        restore_each({name: Restorable(part) for name, part in self._remembering().items()}, trees)
        if seamless:
            loop = trees["loop"]
            self._first_step, self._segment = int(loop["first_step"]), int(loop["segment"])
            self._segment_open = self._seamless = bool(loop["segment_open"])

    def _see(self, observation: Observation) -> None:
        """Open a new segment if the last one was interrupted."""
        broken_off = self._stretch is not None and observation.stretch != self._stretch and not self._seamless
        if broken_off or observation.beginning:
            self._segment_open = False
        self._stretch, self._seamless = observation.stretch, False
        if not self._segment_open:
            self._segment_open = True
            self._segment += 1
            self._agent.begin_segment()

    def _go_blind(self, why: str) -> None:
        if self._blind is None or self._rest_due.due(self.moved_at):
            self._environment.rest()
        self._blind = why
        self._segment_open = False

    def _pause(self) -> None:
        """Stand still until the controller ends the pause, then resume the held action on a new grid."""
        self._segment_open = False
        self._environment.rest()
        while (desired := self._gate.desired).paused and not desired.stopping:
            if self._rest_due.due(self._clock.monotonic()):
                self._environment.rest()  # repeatedly: a datagram may get lost
            self._gate.confirm("paused", desired)
            if self._wished_cut:
                self._take_cut()
            self._gate.wait_for_change(desired, timeout_s=PAUSED_LOOK_S)
            self.moved_at = self._clock.monotonic()
        if not desired.stopping and self.steps and self._blind is None:
            self._environment.resume()
        self._pace.restart()

    def _count(self, tick: Tick) -> None:
        self._latenesses.append(tick.lateness_s)
        self.late_ticks += tick.late
        self.skipped_ticks += tick.skipped

    def _metrics(self, observation: Observation) -> dict[str, float]:
        return {"observation_age_ms": observation.age_s * 1e3, **self._agent.metrics()}

    @property
    def interval_s(self) -> float:
        """Seconds between two steps; 0 = as fast as it goes."""
        return self._pace.interval_s

    def lateness_ms(self) -> dict[str, float]:
        """Quantiles of the tick lateness in milliseconds over the last ticks."""
        recent = np.array(self._latenesses or [0.0]) * 1e3
        p50, p95, p99 = (float(q) for q in np.quantile(recent, (0.5, 0.95, 0.99)))
        return {"p50": p50, "p95": p95, "p99": p99, "max": float(recent.max())}

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the loop."""
        return {
            "steps": self.steps,
            "segment": self._segment,
            "late_ticks": self.late_ticks,
            "skipped_ticks": self.skipped_ticks,
            "blind_ticks": self.blind_ticks,
            "not_finite": self.not_finite,
            "tick_lateness_ms": self.lateness_ms(),
            "trouble": self._blind,
            "environment": dict(self._environment.statistics()),
            "agent": dict(getattr(self._agent, "statistics", dict)()),  # optional
        }
