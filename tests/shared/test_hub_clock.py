"""What time it is at the hub, from answers that took a while."""

from __future__ import annotations

import math
import random

import pytest

from ami_shared.hub_clock import HubClock


class Machines:
    """A service's machine whose clock is some seconds off the hub's."""

    def __init__(self, ahead_s: float) -> None:
        self.now, self.ahead_s = 1_000.0, ahead_s
        self.clock = HubClock(lambda: self.now + self.ahead_s)

    def ask(self, there_s: float, back_s: float) -> None:
        asked = self.clock.ask()
        self.now += there_s
        told = self.now
        self.now += back_s
        self.clock.heard(asked, told)

    @property
    def error_s(self) -> float:
        return self.clock.time() - self.now


@pytest.mark.parametrize("ahead_s", [0.0, 3_600.0, -0.4])
def test_times_are_the_hub_s_whatever_the_machine_s_own_clock_says(ahead_s: float) -> None:
    machines, wait = Machines(ahead_s), random.Random(1)
    for _ in range(50):
        machines.ask(0.001 + wait.expovariate(50), 0.001 + wait.expovariate(50))
    assert abs(machines.error_s) < 0.02
    assert machines.clock.statistics()["offset_s"] == pytest.approx(-ahead_s, abs=0.02)


def test_the_error_is_never_more_than_the_doubt() -> None:
    wait = random.Random(2)
    for _ in range(200):
        machines = Machines(wait.uniform(-10, 10))
        for _ in range(wait.randint(1, 20)):
            machines.ask(wait.expovariate(20), wait.expovariate(20))
        doubt_s = machines.clock.doubt_s
        assert doubt_s is not None
        assert abs(machines.error_s) <= 2 * doubt_s + 0.006


def test_a_clock_that_is_not_surely_wrong_is_left_alone_so_that_times_do_not_jitter() -> None:
    machines = Machines(0.0)
    machines.ask(0.001, 0.001)
    first = machines.clock.offset_s
    for _ in range(100):
        machines.ask(0.002, 0.0)
    assert machines.clock.offset_s == first


def test_a_machine_whose_clock_was_set_is_followed() -> None:
    machines = Machines(0.0)
    machines.ask(0.001, 0.001)
    machines.ahead_s = -7_200.0
    machines.ask(0.001, 0.001)
    assert abs(machines.error_s) < 0.01


def test_a_drift_is_followed() -> None:
    machines = Machines(0.0)
    for _ in range(2_000):
        machines.ahead_s += 0.0005
        machines.ask(0.001, 0.001)
    assert abs(machines.error_s) < 0.02


@pytest.mark.parametrize("told", [None, "noon", math.nan, math.inf, 5, [1.0]])
def test_what_is_no_time_is_ignored(told: object) -> None:
    machines = Machines(0.0)
    machines.clock.heard(machines.clock.ask(), told)
    assert machines.clock.doubt_s is None


def test_an_answer_counts_once_and_none_that_a_later_one_has_overtaken() -> None:
    machines = Machines(0.0)
    first = machines.clock.ask()
    machines.now += 1.0
    second = machines.clock.ask()
    machines.clock.heard(second, machines.now)
    for asked in (first, second, None):
        machines.clock.heard(asked, 5.0)
    assert machines.clock.offset_s == 0.0


def test_a_line_so_slow_that_the_next_question_is_asked_first_tells_the_time_as_well() -> None:
    machines = Machines(-300.0)
    asked: list[tuple[float, float]] = []
    for _ in range(10):
        asked.append((machines.clock.ask(), machines.now + 0.4))
        machines.now += 0.5
        if len(asked) > 1:
            machines.clock.heard(*asked.pop(0))
    assert abs(machines.error_s) < 0.6
