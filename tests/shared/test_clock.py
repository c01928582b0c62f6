from __future__ import annotations

import time

import pytest

from ami_shared.clock import Every, Grid, Rate, SystemClock, Tick
from manual_clock import ManualClock


def test_the_grid_never_drifts() -> None:
    clock = ManualClock(1_000.0)
    grid = Grid(0.1, clock)
    for n in range(10_000):
        tick = grid.wait()
        assert clock.now == pytest.approx(1_000.0 + n * 0.1, abs=1e-9)
        assert not tick.late
        assert tick.skipped == 0
        clock.now += 0.03 + 0.06 * (n % 2)  # work


def test_a_late_tick_keeps_the_grid_and_says_how_late_it_is() -> None:
    clock = ManualClock()
    grid = Grid(0.1, clock, tolerance=0.2)
    grid.wait()
    clock.now = 0.15
    assert grid.wait() == Tick(pytest.approx(0.05), 0, True)
    grid.wait()
    assert clock.now == pytest.approx(0.2)


@pytest.mark.parametrize(("lateness", "late"), [(0.015, False), (0.025, True)])
def test_a_tick_is_late_beyond_the_tolerance(lateness: float, late: bool) -> None:
    clock = ManualClock()
    grid = Grid(0.1, clock, tolerance=0.2)
    clock.now = lateness
    assert grid.wait().late is late


def test_points_that_passed_are_skipped_counted_and_never_pile_up() -> None:
    clock = ManualClock()
    grid = Grid(0.1, clock)
    grid.wait()
    clock.now = 0.57
    tick = grid.wait()
    assert (tick.skipped, tick.late) == (4, True)
    assert tick.lateness_s == pytest.approx(0.47)
    following = grid.wait()
    assert clock.now == pytest.approx(0.6)
    assert (following.skipped, following.late) == (0, False)


def test_an_interval_of_zero_never_waits_and_is_never_late() -> None:
    clock = ManualClock(5.0)
    grid = Grid(0.0, clock)
    for _ in range(3):
        clock.now += 10.0
        now = clock.now
        assert grid.wait() == Tick(0.0, 0, False)
        assert clock.now == now


def test_a_restarted_grid_begins_now() -> None:
    clock = ManualClock()
    grid = Grid(0.1, clock)
    grid.wait()
    clock.now = 7.03
    grid.restart()
    assert grid.wait() == Tick(0.0, 0, False)
    assert clock.now == 7.03
    grid.wait()
    assert clock.now == pytest.approx(7.13)


def test_every_is_due_once_per_interval() -> None:
    every = Every(2.0, now=10.0)
    assert [every.due(now) for now in (10.0, 11.9, 12.0, 12.1, 13.9, 14.0)] == [False, False, True, False, False, True]


def test_every_may_be_due_earlier_the_first_time() -> None:
    every = Every(2.0, first_after_s=0.0, now=10.0)
    assert [every.due(now) for now in (10.0, 11.0, 12.0)] == [True, False, True]


def test_every_does_not_make_up_for_what_it_missed() -> None:
    every = Every(1.0, now=0.0)
    assert [every.due(now) for now in (9.5, 9.6, 10.5)] == [True, False, True]


def test_a_rate_is_taken_over_its_window() -> None:
    rate = Rate(window_s=5.0)
    assert rate.update(0.0, 0) == 0.0
    for second in range(1, 11):
        value = rate.update(float(second), 10 * second)
    assert value == pytest.approx(10.0)
    for second in range(11, 17):
        value = rate.update(float(second), 100)
    assert value == 0.0


def test_a_rate_of_no_time_is_zero() -> None:
    rate = Rate()
    rate.update(1.0, 5)
    assert rate.update(1.0, 50) == 0.0


def test_a_manual_clock_moves_by_sleeping_and_never_back() -> None:
    clock = ManualClock(3.0)
    clock.sleep(2.0)
    clock.sleep(-9.0)
    assert clock.monotonic() == clock.time() == 5.0


def test_the_system_clock_sleeps_and_does_not_mind_the_past() -> None:
    clock, begin = SystemClock(), time.monotonic()
    clock.sleep(0.02)
    clock.sleep(-1.0)
    assert 0.02 <= clock.monotonic() - begin < 30.0
    assert abs(clock.time() - time.time()) < 30.0
