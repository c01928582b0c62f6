from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from ami_controller import tracker as tracker_module
from ami_controller.mlflow_process import MLflowProcess
from ami_controller.tracker import FIRST_RETRY_S, LONGEST_RETRY_S, Tracker
from ami_shared import limits

PollFor = Callable[..., Any]


class FakeRun:
    """MLflow as it is on bad days."""

    uri, run_id, memory_bytes, artifacts_dropped = "fake://", "run 1", 5, 0
    asking_since: float | None = None

    def __init__(self) -> None:
        self.down = self.takes_no_pictures = False
        self.attempts = 0
        self.points: list[tuple[str, float, int, float]] = []
        self.artifacts: list[Path] = []
        self.sent: list[Path] = []
        self.begun = self.finished = self.closed = self.killed = False

    def begin(self) -> None:
        self.attempts += 1
        if self.down:
            raise ConnectionError("connection refused\nand much more")
        self.begun = True

    def log_points(self, points: list[tuple[str, float, int, float]]) -> None:
        self.begin()
        self.points += points

    def queue_artifact(self, path: Path) -> None:
        self.artifacts.append(path)

    def send_artifacts(self) -> None:
        self.begin()
        if self.takes_no_pictures and self.artifacts:
            raise PermissionError("/mlruns")
        self.sent += self.artifacts
        self.artifacts.clear()

    def begin_anew(self) -> None:
        self.begun = False

    def finish(self) -> None:
        self.finished = True

    def close(self) -> None:
        self.closed = True

    def kill(self) -> None:
        self.killed = True


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an end wait for MLflow as long as a busy machine needs."""
    monkeypatch.setattr(tracker_module, "CLOSE_S", 30.0)


def make(run_dir: Path, run: FakeRun | None, interval_s: float = 0.01) -> Tracker:
    return Tracker(run_dir, cast(MLflowProcess | None, run), interval_s)


def write(tracker: Tracker, now: float) -> None:
    """Let it do what its two threads do."""
    tracker._write_files()
    if tracker._run:
        tracker._write_to_mlflow_if_due(now)


@pytest.fixture
def run() -> FakeRun:
    return FakeRun()


@pytest.fixture
def tracker(tmp_path: Path, run: FakeRun) -> Iterator[Tracker]:
    """A tracker that is not started: each test lets it write when it likes."""
    return make(tmp_path, run)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_points_go_to_mlflow_and_to_json_lines(tracker: Tracker, run: FakeRun, tmp_path: Path) -> None:
    tracker.put_points("body", [("late", 1.0, 5, 100.5), ("rate", 2.0, 5, 100.5)])
    write(tracker, 0.0)
    assert lines(tmp_path) == [
        {"time": 100.5, "name": "body/late", "step": 5, "value": 1.0},
        {"time": 100.5, "name": "body/rate", "step": 5, "value": 2.0},
    ]
    assert run.points == [("body/late", 1.0, 5, 100.5), ("body/rate", 2.0, 5, 100.5)]
    write(tracker, 0.0)
    assert len(lines(tmp_path)) == len(run.points) == 2
    told = tracker.statistics()
    assert (told["written"], told["queued"], told["state"], told["mlflow_run"]) == (2, 0, "writing", "run 1")


def test_json_lines_are_continued_and_stay_json(tracker: Tracker, run: FakeRun, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"name": "earlier"}\n')
    tracker.put_points("t", [("a", math.nan, 1, 0.0), ("b", -math.inf, 1, 0.0), ("c", 1.0, 1, 0.0)])
    write(tracker, 0.0)
    assert [line.get("value") for line in lines(tmp_path)] == [None, "nan", "-inf", 1.0]
    assert [name for name, *_ in run.points] == ["t/c"]
    assert tracker.statistics()["not_finite"] == 2


def test_a_thousand_points_and_more_are_written_in_order(tracker: Tracker, run: FakeRun, tmp_path: Path) -> None:
    tracker.put_points("t", [("x", float(i), i, 0.0) for i in range(2_500)])
    write(tracker, 0.0)
    assert [step for _, _, step, _ in run.points] == list(range(2_500))
    assert [line["step"] for line in lines(tmp_path)] == list(range(2_500))


def test_while_mlflow_is_down_nothing_is_lost_and_json_lines_go_on(
    tracker: Tracker, run: FakeRun, tmp_path: Path
) -> None:
    run.down = True
    now = time.monotonic()
    for step in range(3):
        tracker.put_points("t", [("x", 1.0, step, 0.0)])
        write(tracker, now)
    assert run.attempts == 1  # the back-off has begun
    assert len(lines(tmp_path)) == 3
    told = tracker.statistics()
    assert (told["state"], told["queued"]) == ("trouble", 3)
    assert "ConnectionError: connection refused" in told["trouble"]
    assert "\n" not in told["trouble"]
    run.down = False
    write(tracker, time.monotonic() + FIRST_RETRY_S)
    assert [step for _, _, step, _ in run.points] == [0, 1, 2]
    assert tracker.statistics()["trouble"] is None
    assert tracker.statistics()["queued"] == 0


def puts_off(tracker: Tracker, delay_s: float) -> bool:
    """Let it try, and return whether it will try again so much later."""
    before = time.monotonic()
    write(tracker, before + 1e6)
    return before + delay_s <= tracker._retry_at <= time.monotonic() + delay_s


def test_attempts_become_rarer_and_begin_anew_after_a_success(tracker: Tracker, run: FakeRun) -> None:
    run.down = True
    for delay_s in (2, 4, 8, 16, 32, LONGEST_RETRY_S, LONGEST_RETRY_S, LONGEST_RETRY_S):
        assert puts_off(tracker, delay_s)
    run.down = False
    write(tracker, time.monotonic() + 1e6)
    run.down = True
    assert puts_off(tracker, FIRST_RETRY_S)


def test_a_failing_batch_is_sent_again_and_the_ones_before_it_are_not(tracker: Tracker, run: FakeRun) -> None:
    tracker.put_points("t", [("x", 1.0, step, 0.0) for step in range(1_500)])
    log_points = run.log_points

    def fail_at_the_second(points: Any) -> None:
        if run.points:
            raise TimeoutError
        log_points(points)

    run.log_points = fail_at_the_second  # type: ignore[method-assign]
    write(tracker, 0.0)
    assert len(run.points) == 1_000
    run.log_points = log_points  # type: ignore[method-assign]
    write(tracker, time.monotonic() + FIRST_RETRY_S)
    assert [step for _, _, step, _ in run.points] == list(range(1_500))


def test_queues_are_bounded_and_what_they_drop_is_counted(tracker: Tracker, run: FakeRun, tmp_path: Path) -> None:
    run.down = True
    for step in range(limits.METRICS_QUEUE + 5):
        tracker.put_points("t", [("x", 1.0, step, 0.0)])
        if step % 5_000 == 0:
            write(tracker, 0.0)
    assert tracker.dropped == 5
    assert tracker.statistics()["queued"] == limits.METRICS_QUEUE
    write(tracker, 0.0)
    assert len(lines(tmp_path)) == limits.METRICS_QUEUE + 5


def test_points_that_no_file_could_take_are_written_when_it_can(tracker: Tracker, run: FakeRun, tmp_path: Path) -> None:
    obstacle = tmp_path / "metrics.jsonl"
    obstacle.mkdir()
    tracker.put_points("t", [("x", 1.0, 1, 0.0)])
    write(tracker, 0.0)
    assert len(run.points) == 1
    assert "cannot be written to" in tracker.statistics()["trouble"]  # MLflow's success does not hide it
    obstacle.rmdir()
    write(tracker, 0.0)
    assert len(lines(tmp_path)) == 1
    assert tracker.statistics()["trouble"] is None


FULL_DISK = """
import pathlib, resource, sys
from ami_controller.tracker import append_lines
path = pathlib.Path(sys.argv[1])
append_lines(path, b"before\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
try:
    append_lines(path, b"a line\\n" * 10)
except OSError:
    print(path.read_text(), end="")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
append_lines(path, b"after\\n")
"""


def test_of_lines_that_do_not_fit_on_the_disk_none_is_there(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    path = tmp_path / "lines"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "before\n"
    assert path.read_text() == "before\nafter\n"


def test_a_line_that_a_killed_process_did_not_end_is_removed(tracker: Tracker, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st' + "x" * 10_000)
    tracker.put_points("t", [("x", 1.0, 2, 0.0)])
    write(tracker, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_trouble_of_the_files_passes_without_mlflow_too(tmp_path: Path) -> None:
    tracker = make(tmp_path, None)
    (tmp_path / "metrics.jsonl").mkdir()
    tracker.put_points("t", [("x", 1.0, 1, 0.0)])
    write(tracker, 0.0)
    (tmp_path / "metrics.jsonl").rmdir()
    write(tracker, 0.0)
    assert tracker.statistics()["trouble"] is None
    assert len(lines(tmp_path)) == 1


def test_a_picture_is_a_file_and_an_artifact(tracker: Tracker, run: FakeRun, tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    tracker.put_picture("image_vae", "reconstructions", 42, pixels)
    write(tracker, 0.0)
    path = tmp_path / "pictures" / "image_vae-reconstructions-00000042.png"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert run.sent == [path]


def test_pictures_that_mlflow_does_not_take_hold_up_no_points(tracker: Tracker, run: FakeRun, tmp_path: Path) -> None:
    run.takes_no_pictures = True
    tracker.put_picture("t", "p", 1, np.zeros((2, 2, 3), np.uint8))
    for step in range(3):
        tracker.put_points("t", [("x", 1.0, step, 0.0)])
        write(tracker, float(step))
    assert len(run.points) == 3
    trouble = tracker.statistics()["trouble"]
    assert "MLflow does not take pictures (PermissionError: /mlruns)" in trouble
    assert str(tmp_path / "pictures") in trouble
    assert "metrics" not in trouble
    run.takes_no_pictures = False
    write(tracker, LONGEST_RETRY_S + 1.0)
    assert (len(run.sent), tracker.statistics()["trouble"]) == (1, None)


@pytest.mark.parametrize("service", ["../../evil", "/evil", "a/b", "..", "x" * 250])
@pytest.mark.parametrize("name", ["../../evil", "/evil", ".", "\x00"])
def test_a_picture_never_leaves_its_folder(tracker: Tracker, tmp_path: Path, service: str, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = make(folder, None)
    tracker.put_picture(service, name, 1, np.zeros((2, 2, 3), np.uint8))
    write(tracker, 0.0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent for path in files] == [folder / "pictures"]


def test_only_the_last_pictures_wait(tracker: Tracker) -> None:
    for step in range(20):
        tracker.put_picture("t", "p", step, np.zeros((2, 2, 3), np.uint8))
    assert tracker.dropped == 4


def test_what_is_queued_at_the_end_is_written(tmp_path: Path, run: FakeRun) -> None:
    tracker = make(tmp_path, run, interval_s=60.0)
    tracker.start()
    tracker.put_points("t", [("x", 1.0, 1, 0.0)])
    tracker.close()
    assert not tracker.is_alive()
    assert len(lines(tmp_path)) == len(run.points) == 1
    assert run.finished
    assert run.closed
    assert not run.killed


def test_a_run_that_mlflow_never_took_is_not_finished_and_nobody_says_that_it_is_written_again(
    tmp_path: Path, run: FakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run.down = True
    tracker = make(tmp_path, run, interval_s=60.0)
    tracker.start()
    tracker.put_points("t", [("x", 1.0, 1, 0.0)])
    tracker.close()
    assert (run.finished, run.closed) == (False, True)
    assert "does not take metrics" in caplog.text
    assert "again" not in caplog.text


def test_the_thread_writes_at_its_interval(tmp_path: Path, run: FakeRun, poll_for: PollFor) -> None:
    tracker = make(tmp_path, run)
    tracker.start()
    tracker.put_points("t", [("x", 1.0, 1, 0.0)])
    poll_for(lambda: run.points)
    run.down = True
    tracker.put_points("t", [("x", 1.0, 2, 0.0)])
    poll_for(lambda: tracker.statistics()["state"] == "trouble")
    assert tracker.is_alive()
    tracker.close()
    assert len(lines(tmp_path)) == 2


def test_a_picture_that_cannot_be_drawn_does_not_hold_up_the_next(tracker: Tracker, tmp_path: Path) -> None:
    tracker.put_picture("t", "odd", 1, np.zeros((2, 2, 7), np.float32))
    tracker.put_picture("t", "good", 2, np.zeros((2, 2, 3), np.uint8))
    write(tracker, 0.0)
    assert [path.name for path in (tmp_path / "pictures").glob("*.png")] == ["t-good-00000002.png"]
    assert tracker.statistics()["dropped"] == 1


def test_the_file_gets_the_last_points_though_mlflow_takes_its_time(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "CLOSE_S", 1.5)
    within, slow = threading.Event(), threading.Event()
    run.begin = lambda: within.set() or slow.wait(60.0)  # type: ignore[method-assign,assignment,return-value,func-returns-value]
    tracker = make(tmp_path, run)
    tracker.start()
    assert within.wait(30.0)
    tracker.put_points("body", [("last", 1.0, 1, 1.0)])
    tracker.close()
    tracker.join(30.0)
    assert [line["name"] for line in lines(tmp_path)] == ["body/last"]
    assert run.killed
    slow.set()


def test_while_mlflow_hangs_the_file_goes_on_and_it_is_said(run: FakeRun, tmp_path: Path, poll_for: PollFor) -> None:
    within, slow = threading.Event(), threading.Event()
    run.begin = lambda: within.set() or slow.wait(120.0)  # type: ignore[method-assign,assignment,return-value,func-returns-value]
    run.asking_since = time.monotonic() - tracker_module.LONG_S - 1.0
    tracker = make(tmp_path, run)
    tracker.start()
    assert within.wait(30.0)
    for step in range(3):
        tracker.put_points("body", [("x", 1.0, step, 1.0)])
        poll_for(lambda count=step + 1: len(lines(tmp_path)) == count)
    assert "MLflow has not answered for" in tracker.statistics()["trouble"]
    slow.set()
    poll_for(lambda: not tracker.statistics()["queued"])
    tracker.close()
    assert len(run.points) == 3


def test_of_each_picture_the_newest_stay(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "KEPT_PICTURES", 2)
    for step in (7, 99_999_999, 100_000_000, 3):  # the run was taken back before the last
        tracker.put_picture("t", "p", step, np.zeros((2, 2, 3), np.uint8))
        write(tracker, 0.0)
        time.sleep(0.02)
    tracker.put_picture("t", "p-left", 1, np.zeros((2, 2, 3), np.uint8))
    tracker.put_picture("t", "夢" * 92, 9, np.zeros((2, 2, 3), np.uint8))
    write(tracker, 0.0)
    (tmp_path / "pictures" / "t-q-00000000.png").mkdir()  # cannot be unlinked
    for step in (1, 2):
        (tmp_path / "pictures" / f"t-q-0000000{step}.png").touch()
        os.utime(tmp_path / "pictures" / f"t-q-0000000{step}.png", (9e9, 9e9))  # by a clock that was set back
    for step in (3, 4):
        tracker.put_picture("t", "q", step, np.zeros((2, 2, 3), np.uint8))
        write(tracker, 0.0)
    assert sorted(path.name for path in (tmp_path / "pictures").glob("t-q-*"))[-1:] == ["t-q-00000004.png"]
    assert not (tmp_path / "pictures" / "t-q-00000001.png").exists()
    for path in (tmp_path / "pictures").glob("t-q-*"):
        path.rmdir() if path.is_dir() else path.unlink()
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names[1:] == ["t-p-00000003.png", "t-p-100000000.png", "t-p-left-00000001.png"]
    assert names[0].startswith("t-_")
    assert tracker.statistics()["trouble"] is None


def test_the_last_picture_reaches_mlflow_at_the_end(run: FakeRun, tmp_path: Path) -> None:
    tracker = make(tmp_path, run, interval_s=60.0)
    sent: list[int] = []
    run.send_artifacts = lambda: sent.append(len(run.artifacts))  # type: ignore[method-assign]
    tracker.start()
    tracker.put_picture("t", "p", 1, np.zeros((480, 640, 3), np.uint8))
    tracker.close()
    assert sent[-1] == 1
