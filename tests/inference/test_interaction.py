"""The interaction loop on a clock that moves only when told to, in a world that is a script."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from ami_inference.agents.agent import Decision
from ami_inference.environments import RealTimeEnvironment
from ami_inference.interaction import BLIND_LOOK_S, Interaction
from ami_inference.sensors.sensor import Observation
from ami_shared.clock import Grid
from ami_shared.errors import NotFiniteError, SensorLostError
from ami_shared.gate import Condition, Desired, Gate
from ami_shared.models.replicas import Replicas
from ami_shared.records import Ending, Record
from ami_shared.snapshots import Snapshot
from ami_shared.state import state_of
from ami_shared.wire import Array
from manual_clock import ManualClock

PollFor = Callable[..., Any]
IMAGE = np.zeros((3, 2, 2), np.uint8)


class World:
    """An environment that writes down what is done to it; `at` holds what happens at the n-th look."""

    choices = (3,)
    max_silence_s = math.inf
    waits = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.at: dict[int, Callable[[], Any]] = {}
        self.looks = 0
        self.stretch = 0
        self.lost: str | None = None
        self.endings: dict[int, Ending] = {}

    def observe(self) -> Observation:
        event = self.at.get(self.looks, lambda: None)
        self.looks += 1
        event()
        if self.lost:
            raise SensorLostError(self.lost)
        ending = self.endings.get(self.looks - 1, Ending.NONE)
        seen = Observation(IMAGE, 0.02, self.stretch, ending=ending)
        self.stretch += bool(ending)
        return seen

    def act(self, action: Array) -> None:
        self.log.append(f"act {action[0]}")

    def rest(self) -> None:
        self.log.append("rest")

    def resume(self) -> None:
        self.log.append("resume")

    def metrics(self) -> Mapping[str, float]:
        return {"episode_return": 7.0}

    def statistics(self) -> Mapping[str, Any]:
        return {"sensor": "script"}

    def close(self) -> None:
        self.log.append("close")


class Counting:
    """An agent whose actions are numbered."""

    def __init__(self) -> None:
        self.steps = 0
        self.segments_begun_at: list[int] = []
        self.blinded = False

    def begin_segment(self) -> None:
        self.segments_begun_at.append(self.steps)

    def metrics(self) -> Mapping[str, float]:
        return {"mood": 0.5}

    def statistics(self) -> Mapping[str, Any]:
        return {"moods": 2}

    def step(self, observation: Observation) -> Decision:
        if self.blinded:
            raise NotFiniteError("the observation is not finite")
        self.steps += 1
        return Decision(np.array([self.steps]), {"observation": observation.values, "n": np.array(self.steps)})


class Life:
    def __init__(self, interval_s: float = 0.1, max_silence_s: float = math.inf, waits: bool = False) -> None:
        self.world, self.agent, self.clock, self.gate = World(), Counting(), ManualClock(1_000.0), Gate()
        self.world.max_silence_s, self.world.waits = max_silence_s, waits
        self.replicas = Replicas({"encoder": nn.Linear(1, 1)})
        self.records: list[Record] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.conditions: list[Condition] = []
        self.when: dict[tuple[str, int], Callable[[], Any]] = {}
        self.gate.on_change = self._changed
        self.interaction = Interaction(
            self.world,
            self.agent,
            self.replicas,
            self,
            self.gate,
            Grid(interval_s, self.clock),
            self.clock,
            lambda step, values: self.metrics.append((step, values)),
        )

    def put(self, record: Record) -> None:
        self.records.append(record)

    def _changed(self) -> None:
        condition = self.gate.condition
        self.conditions.append(condition)
        self.when.get((condition.state, condition.epoch), lambda: None)()

    def wish(self, paused: bool, epoch: int) -> Callable[[], None]:
        return lambda: self.gate.wish(Desired(paused=paused, epoch=epoch))

    def run(self, looks: int) -> Life:
        """Live until the world has been looked at so often."""
        self.world.at[looks] = self.gate.stop
        self.interaction.run()
        return self

    def segments(self) -> list[int]:
        return [record.segment for record in self.records]


@pytest.fixture
def life() -> Life:
    return Life()


def test_every_step_is_one_look_one_action_and_one_record_on_the_grid(life: Life) -> None:
    life.run(4)
    assert life.world.log == ["rest", "act 1", "act 2", "act 3", "act 4", "act 5", "rest"]
    assert [r.sequence for r in life.records] == [0, 1, 2, 3, 4]
    assert [r.time for r in life.records] == pytest.approx([1_000.0, 1_000.1, 1_000.2, 1_000.3, 1_000.4])
    assert [int(r.data["n"]) for r in life.records] == [1, 2, 3, 4, 5]
    assert life.segments() == [0] * 5
    assert life.agent.segments_begun_at == [0]
    assert life.interaction.steps == 5


def test_the_environment_rests_before_the_first_step(life: Life) -> None:
    life.gate.stop()
    life.interaction.run()
    assert life.world.log == ["rest", "rest"]
    assert life.records == []


def test_a_pause_rests_confirms_and_takes_up_the_held_action_in_a_new_segment(life: Life) -> None:
    life.world.at[2] = life.wish(paused=True, epoch=1)
    life.when["paused", 1] = life.wish(paused=False, epoch=2)
    life.run(5)
    assert life.world.log == [
        "rest", "act 1", "act 2", "act 3", "rest", "resume", "act 4", "act 5", "act 6", "rest",
    ]  # fmt: skip
    assert life.segments() == [0, 0, 0, 1, 1, 1]
    assert [r.sequence for r in life.records] == list(range(6))
    assert Condition("paused", 1) in life.conditions
    assert life.conditions[-1] == Condition("running", 2)


def test_nothing_happens_while_paused(life: Life, poll_for: PollFor) -> None:
    life.world.at[1] = life.wish(paused=True, epoch=1)
    thread = threading.Thread(target=life.run, args=(4,))
    thread.start()
    try:
        poll_for(lambda: life.gate.condition == Condition("paused", 1))
        acts = [what for what in life.world.log if what != "rest"]
        before = (life.world.looks, len(life.records), life.clock.now)
        life.gate.wish(Desired(paused=True, epoch=3))  # paused, resumed and paused again meanwhile
        poll_for(lambda: life.gate.condition == Condition("paused", 3))
        time.sleep(0.1)
        assert (life.world.looks, len(life.records), life.clock.now) == before
        assert [what for what in life.world.log if what != "rest"] == acts, "resting, and nothing else"
    finally:
        life.gate.wish(Desired(paused=False, epoch=4))
        thread.join(30)
    assert not thread.is_alive()
    assert len(life.records) == 5


def test_a_pause_before_the_first_step_has_nothing_to_take_up(life: Life) -> None:
    life.gate.wish(Desired(paused=True, epoch=1))
    life.when["paused", 1] = life.wish(paused=False, epoch=2)
    life.run(0)
    assert life.world.log == ["rest", "rest", "act 1", "rest"]


def test_a_pause_that_comes_in_the_middle_of_a_step_is_not_confirmed_by_that_step(life: Life) -> None:
    life.world.at[1] = life.wish(paused=True, epoch=1)
    life.when["paused", 1] = life.gate.stop
    life.run(99)
    assert life.conditions == [Condition("running", 0), Condition("paused", 1)]


def test_a_body_that_stays_blind_is_put_to_rest_again_every_second(life: Life) -> None:
    def lose() -> None:
        life.world.lost = "camera 0 is gone"

    life.world.at[1] = lose
    life.run(35)
    assert life.world.log[:2] == ["rest", "act 1"]
    assert set(life.world.log[2:]) == {"rest"}
    assert 4 <= life.world.log[2:].count("rest") <= 6


def test_a_stop_ends_a_pause_at_rest(life: Life) -> None:
    life.world.at[1] = life.wish(paused=True, epoch=1)
    life.when["paused", 1] = life.gate.stop
    life.run(99)
    assert life.world.log == ["rest", "act 1", "act 2", "rest", "rest"]


def test_after_a_pause_a_new_grid_begins(life: Life) -> None:
    def resume_much_later() -> None:
        life.clock.now += 1_000.05
        life.gate.wish(Desired(epoch=2))

    life.world.at[1] = life.wish(paused=True, epoch=1)
    life.when["paused", 1] = resume_much_later
    life.run(3)
    assert life.interaction.late_ticks == life.interaction.skipped_ticks == 0
    resumed = life.records[2].time
    assert resumed > 2_000.0
    assert life.records[3].time == pytest.approx(resumed + 0.1)


def test_a_lost_sensor_rests_once_leaves_no_records_and_opens_a_new_segment(life: Life) -> None:
    def lose() -> None:
        life.world.lost = "camera 0 is gone"

    def find() -> None:
        life.world.lost = None

    seen: list[Any] = []
    life.world.at = {2: lose, 4: lambda: seen.append(life.interaction.statistics()["trouble"]), 5: find}
    life.run(6)
    assert life.world.log == ["rest", "act 1", "act 2", "rest", "act 3", "act 4", "rest"]
    assert life.segments() == [0, 0, 1, 1]
    assert [r.sequence for r in life.records] == [0, 1, 2, 3]
    assert [c.state for c in life.conditions] == ["running", "blind", "running"]
    assert seen == ["camera 0 is gone"]
    told = life.interaction.statistics()
    assert (told["trouble"], told["blind_ticks"], told["not_finite"]) == (None, 3, 0)


def test_a_body_that_is_blind_stays_at_rest_through_pause_and_resume(life: Life) -> None:
    def lose() -> None:
        life.world.lost = "camera 0 is gone"

    life.world.at = {1: lose, 2: life.wish(paused=True, epoch=1)}
    life.when["paused", 1] = life.wish(paused=False, epoch=2)
    life.run(5)
    assert life.world.log[:3] == ["rest", "act 1", "rest"]
    assert set(life.world.log[3:]) == {"rest"}
    assert life.conditions[-1] == Condition("blind", 2)


def test_a_source_that_was_away_between_two_looks_opens_a_new_segment(life: Life) -> None:
    def away() -> None:
        life.world.stretch += 1

    life.world.at = {2: away, 4: away}
    life.run(5)
    assert life.segments() == [0, 0, 1, 1, 2, 2]
    assert life.agent.segments_begun_at == [0, 2, 4]
    assert life.world.log.count("rest") == 2


def test_whatever_goes_wrong_the_environment_is_left_at_rest(life: Life) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a defect in a component")

    life.world.at[2] = fail
    with pytest.raises(ZeroDivisionError):
        life.interaction.run()
    assert life.world.log == ["rest", "act 1", "act 2", "rest"]


def test_records_carry_the_versions_that_the_step_used(life: Life) -> None:
    def arrive(version: int) -> Callable[[], None]:
        arrays = {"weight": np.zeros((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
        return lambda: life.replicas.offer(Snapshot("encoder", version, 0.0, arrays)) and None

    life.world.at = {1: arrive(5), 3: arrive(8)}
    life.run(4)
    # What arrives during a step is used from the next one on.
    assert [r.versions["encoder"] for r in life.records] == [0, 0, 5, 5, 8]


def test_late_ticks_are_counted_and_the_grid_is_kept(life: Life) -> None:
    def work(seconds: float) -> Callable[[], None]:
        def pass_time() -> None:
            life.clock.now += seconds

        return pass_time

    life.world.at = {1: work(0.15), 3: work(0.35)}
    life.run(5)
    latenesses = [record.lateness_s for record in life.records]
    assert latenesses == pytest.approx([0.0, 0.0, 0.05, 0.0, 0.25, 0.0], abs=1e-9)
    told = life.interaction.statistics()
    assert (told["late_ticks"], told["skipped_ticks"]) == (2, 2)
    assert told["tick_lateness_ms"]["max"] == pytest.approx(250.0)
    assert [r.sequence for r in life.records] == list(range(6))
    assert life.records[-1].time == pytest.approx(1_000.7)


def test_metrics_are_told_every_ten_seconds(life: Life) -> None:
    life.run(250)
    assert [step for step, _ in life.metrics] == [101, 201]
    assert life.metrics[0][1]["observation_age_ms"] == pytest.approx(20.0)
    assert life.metrics[0][1]["mood"] == 0.5


def test_an_interval_of_zero_steps_without_waiting() -> None:
    life = Life(interval_s=0.0).run(100)
    assert len(life.records) == 101
    assert life.clock.now == 1_000.0
    assert life.interaction.late_ticks == 0


def test_the_loop_says_when_it_moved_last(life: Life) -> None:
    life.run(3)
    assert life.interaction.moved_at == pytest.approx(1_000.3)


def test_statistics_are_those_of_loop_environment_and_agent(life: Life) -> None:
    told = life.run(3).interaction.statistics()
    assert (told["steps"], told["segment"]) == (4, 0)
    assert (told["environment"], told["agent"]) == ({"sensor": "script"}, {"moods": 2})
    assert set(told["tick_lateness_ms"]) == {"p50", "p95", "p99", "max"}


def test_an_episode_s_end_leaves_a_last_record_whose_action_is_not_carried_out(life: Life) -> None:
    life.world.endings = {2: Ending.TERMINATED, 4: Ending.TRUNCATED}
    life.run(6)
    assert life.world.log == ["rest", "act 1", "act 2", "act 4", "act 6", "act 7", "rest"]
    assert [r.ending for r in life.records] == [0, 0, Ending.TERMINATED, 0, Ending.TRUNCATED, 0, 0]
    assert [r.sequence for r in life.records] == list(range(7))
    assert [int(r.data["n"]) for r in life.records] == [1, 2, 3, 4, 5, 6, 7]
    assert life.segments() == [0, 0, 0, 1, 1, 2, 2]
    assert life.agent.segments_begun_at == [0, 3, 5]


def test_an_end_closes_the_segment_whatever_the_environment_says_of_stretches(life: Life) -> None:
    def same_stretch() -> None:
        life.world.stretch = 0

    life.world.endings = {1: Ending.TERMINATED, 2: Ending.TERMINATED}
    life.world.at = {2: same_stretch, 3: same_stretch}
    life.run(4)
    assert life.segments() == [0, 0, 1, 2, 2]


def test_every_episode_is_told_of_at_its_end(life: Life) -> None:
    life.world.endings = {2: Ending.TERMINATED, 4: Ending.TRUNCATED}
    life.run(6)
    assert life.metrics == [(3, {"episode_return": 7.0}), (5, {"episode_return": 7.0})]


def test_a_pause_at_an_episode_s_end_does_not_count_it_twice(life: Life) -> None:
    life.world.endings = {1: Ending.TERMINATED}
    life.world.at[1] = life.wish(paused=True, epoch=1)
    life.when["paused", 1] = life.wish(paused=False, epoch=2)
    life.run(3)
    assert life.segments() == [0, 0, 1, 1]
    assert len(life.metrics) == 1


def arrive(life: Life, version: int) -> Callable[[], None]:
    arrays = {"weight": np.zeros((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    return lambda: life.replicas.offer(Snapshot("encoder", version, 0.0, arrays)) and None


def test_the_first_record_after_a_swap_is_marked(life: Life) -> None:
    life.world.at = {1: arrive(life, 5), 4: arrive(life, 8), 5: arrive(life, 9)}
    life.run(7)
    assert [r.swapped for r in life.records] == [False, False, True, False, False, True, True, False]
    assert [r.versions["encoder"] for r in life.records] == [0, 0, 5, 5, 5, 8, 9, 9]


def test_a_swap_while_nothing_was_seen_marks_the_next_record(life: Life) -> None:
    def lose() -> None:
        arrive(life, 5)()
        life.world.lost = "camera 0 is gone"

    def find() -> None:
        life.world.lost = None

    life.world.at = {1: lose, 4: find}
    life.run(5)
    assert [(r.segment, r.swapped) for r in life.records] == [(0, False), (1, True), (1, False)]


def test_an_agent_that_cannot_use_what_it_sees_is_blind(life: Life) -> None:
    def spoil() -> None:
        life.agent.blinded = True

    def mend() -> None:
        life.agent.blinded = False

    seen: list[Any] = []
    life.world.at = {2: spoil, 4: lambda: seen.append(life.interaction.statistics()["trouble"]), 5: mend}
    life.run(6)
    assert life.world.log == ["rest", "act 1", "act 2", "rest", "act 3", "act 4", "rest"]
    assert [r.sequence for r in life.records] == [0, 1, 2, 3]
    assert life.records[1].segment < life.records[2].segment == life.records[3].segment
    assert [c.state for c in life.conditions] == ["running", "blind", "running"]
    assert seen == ["the observation is not finite"]
    told = life.interaction.statistics()
    assert (told["trouble"], told["blind_ticks"], told["not_finite"]) == (None, 3, 3)


class Part:
    """A sensor and an actuator in one, which writes down what is asked of it."""

    choices = (2, 3)
    max_silence_s = 0.5

    def __init__(self, name: str) -> None:
        self.name = name
        self.log: list[str] = []

    def statistics(self) -> dict[str, str]:
        return {self.name: "well"}

    def read(self) -> Observation:
        self.log.append("read")
        return Observation(IMAGE)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: self.log.append(name)


def test_an_environment_is_a_sensor_and_an_actuator() -> None:
    sensor, actuator = Part("sensor"), Part("actuator")
    environment = RealTimeEnvironment(sensor, actuator)
    assert environment.choices == (2, 3)
    assert environment.observe().values is IMAGE
    environment.act(np.zeros(2))
    environment.rest()
    environment.resume()
    assert environment.statistics() == {"sensor": "well", "actuator": "well"}
    assert environment.max_silence_s == 0.5
    environment.close()
    assert sensor.log == ["read", "close"]
    assert actuator.log == ["act", "neutral", "resume", "close"]


@pytest.mark.parametrize("beginning", [False, True])
def test_a_seamless_restore_goes_on_in_its_segment_only_where_the_world_does(life: Life, beginning: bool) -> None:
    look = life.world.observe
    life.world.observe = lambda: replace(look(), beginning=beginning and life.world.looks == 1)  # type: ignore[method-assign]
    trees = {name: dict(state_of(part)) for name, part in life.interaction._remembering().items()}
    trees["loop"] |= {"steps": 7, "first_step": 3, "segment": 4, "segment_open": True}
    life.interaction.restore_all(trees, seamless=True)
    life.run(3)
    assert life.segments() == ([5] * 4 if beginning else [4] * 4)
    assert life.agent.segments_begun_at == ([0] if beginning else [])


def test_a_stall_of_many_steps_begins_a_new_segment(life: Life) -> None:
    """What was held was let go of long since: what is seen then does not follow from what was done before."""
    life.world.at[2] = lambda: life.clock.sleep(0.9)
    life.world.at[4] = lambda: life.clock.sleep(1.2)
    life.run(6)
    assert life.segments() == [0, 0, 0, 0, 0, 1, 1]
    assert life.interaction.skipped_ticks == 8 + 11


def test_a_silence_in_which_the_actuator_lets_go_begins_a_new_segment() -> None:
    life = Life(max_silence_s=0.5)
    life.world.at[2] = lambda: life.clock.sleep(0.45)
    life.world.at[4] = lambda: life.clock.sleep(0.55)
    life.run(6)
    assert life.segments() == [0, 0, 0, 0, 0, 1, 1]


def test_a_machine_that_was_suspended_begins_a_new_segment(life: Life) -> None:
    """Nothing was late by a clock that stood still with the machine."""

    def suspend() -> None:
        life.clock.slept += 3_600.0

    life.clock.slept = 50.0  # before this body's time
    life.world.at[2] = suspend
    life.run(4)
    assert life.segments() == [0, 0, 0, 1, 1]


def test_without_a_grid_a_silence_in_which_the_actuator_lets_go_begins_a_new_segment_too() -> None:
    free = Life(interval_s=0.0, max_silence_s=0.5)
    free.world.at[3] = lambda: free.clock.sleep(0.4)
    free.world.at[5] = lambda: free.clock.sleep(60.0)
    free.run(looks=8)
    assert free.segments() == [0] * 6 + [1] * 3


@pytest.mark.parametrize("interval_s", [0.1, 0.0])
def test_in_a_world_that_waits_no_step_is_too_slow(interval_s: float) -> None:
    slow = Life(interval_s, waits=True)
    for look in range(1, 5):
        slow.world.at[look] = lambda: slow.clock.sleep(1.3)
    slow.run(looks=6)
    assert slow.segments() == [0] * 7


def test_a_blind_body_that_runs_free_does_not_look_all_the_time() -> None:
    life = Life(interval_s=0.0)
    life.world.lost = "dark"
    begin = time.monotonic()
    life.run(5)
    assert time.monotonic() - begin >= 5 * BLIND_LOOK_S
    assert life.interaction.blind_ticks == 6


def test_what_breaks_as_the_actuator_closes_does_not_keep_the_camera() -> None:
    closed: list[str] = []

    class Part:
        choices = (1,)

        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            if self.name == "actuator":
                raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        RealTimeEnvironment(Part("sensor"), Part("actuator")).close()  # type: ignore[arg-type]
    assert closed == ["actuator", "sensor"]
