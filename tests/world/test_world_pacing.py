from __future__ import annotations

import pytest

from ami_world.pacing import FrameGrid, HangWatch, RateMeter, TicGrid

pytestmark = pytest.mark.filterwarnings("error")


def test_the_grid_does_not_drift_when_tics_take_time() -> None:
    grid, now = TicGrid(35, start_s=100.0), 100.0
    for _ in range(35 * 60):
        now += grid.wait_s(now) + 0.02
        grid.advance(now)
    assert grid.wait_s(160.0) == pytest.approx(0.0, abs=1e-9)
    assert (grid.index, grid.skipped) == (2100, 0)


def test_one_late_tic_is_run_at_once_and_not_skipped() -> None:
    grid = TicGrid(10, start_s=0.0)
    grid.advance(0.15)
    assert (grid.index, grid.skipped, grid.wait_s(0.15)) == (1, 0, 0.0)


def test_after_a_long_stall_the_missed_tics_are_skipped_not_piled_up() -> None:
    grid = TicGrid(10, start_s=0.0)
    grid.advance(2.05)
    assert (grid.index, grid.skipped) == (20, 19)
    grid.advance(2.06)
    assert grid.wait_s(2.06) == pytest.approx(0.04)


@pytest.mark.parametrize("frame_rate", [1, 10, 30, 35])
def test_frames_come_at_their_own_rate(frame_rate: int) -> None:
    frames = FrameGrid(frame_rate, 35)
    assert sum(frames.due(tic) for tic in range(35 * 10)) == frame_rate * 10


def test_skipped_tics_do_not_bring_back_missed_frames() -> None:
    frames = FrameGrid(30, 35)
    assert [frames.due(tic) for tic in (0, 100, 101)] == [True, True, True]


def test_tics_that_stop_are_a_hang_after_a_while() -> None:
    watch = HangWatch(hang_s=60.0, look_s=1.0)
    assert not any(watch.has_hung(tics, float(tics)) for tics in range(100))
    hung = [watch.has_hung(99, 99.0 + s) for s in range(1, 80)]
    assert hung.index(True) == 60
    assert all(hung[60:])


def test_while_the_machine_sleeps_nothing_hangs() -> None:
    watch = HangWatch(hang_s=60.0, look_s=1.0)
    assert not watch.has_hung(5, 10.0)
    assert not watch.has_hung(5, 3_600.0)
    assert not watch.has_hung(5, 3_601.0)


def test_the_rate_is_measured_over_the_newest_events() -> None:
    meter = RateMeter(3)
    assert meter.rate_hz() == 0.0
    for time_s in (0.0, 10.0, 10.5, 11.0):
        meter.mark(time_s)
    assert meter.rate_hz() == 2.0
