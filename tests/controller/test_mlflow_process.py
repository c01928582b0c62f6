"""MLflow's own process: started late, started again, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ami_controller import mlflow_process
from ami_controller.mlflow_process import MLflowError, MLflowProcess

PollFor = Callable[..., Any]

STAND_IN = """
import os, sys, time
from ami_controller import mlflow_process

class Run:
    def __init__(self, uri, experiment, artifact_dir, parameters, run_id):
        self.uri, self.run_id, self.points = uri, run_id, 0
    def begin(self):
        print("a word on standard output")
        self.run_id = self.run_id or "new"
        if self.uri == "slow://":
            time.sleep(60)
        if self.uri == "down://":
            raise ConnectionError("refused\\nand more")
    def log_points(self, points):
        if points[0][0] == "hang":
            time.sleep(60)
        if points[0][0] == "die":
            os._exit(3)
        self.points += len(points)
    def log_artifact(self, path):
        open(path + ".logged", "w").close()
    def finish(self):
        raise ValueError(f"{self.points} points")

mlflow_process.MLflowRun = Run
mlflow_process.main()
"""

ALIVE = """
import sys
from pathlib import Path
from ami_controller.mlflow_process import MLflowProcess
process = MLflowProcess(f"sqlite:///{sys.argv[1]}/mlflow.db", "ami-test", Path(sys.argv[1]), {}, None, lambda run: None)
process.begin()
process.log_points([("x", 1.0, 1, 1.0)])
print(process.memory_bytes, int("mlflow" in sys.modules), process._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def begun() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, begun: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., MLflowProcess]]:
    """Makes processes in which everything is real but MLflow."""
    made = []
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    start = subprocess.Popen
    monkeypatch.setattr(
        mlflow_process.subprocess, "Popen", lambda command, **options: start([command[0], str(program)], **options)
    )

    def make(uri: str = "fake://", run_id: str | None = None) -> MLflowProcess:
        made.append(MLflowProcess(uri, "ami-test", None, {"seed": 3}, run_id, begun.append))
        return made[-1]

    yield make
    for process in made:
        process.kill()


def test_a_new_run_is_told_once(make: Callable[..., MLflowProcess], begun: list[str]) -> None:
    process = make()
    assert process.memory_bytes == 0
    process.begin()
    process.begin()
    process.begin_anew()
    process.begin()
    assert process.run_id == "new"
    assert begun == ["new"]
    assert process.memory_bytes > 1e6


def test_a_known_run_goes_on(make: Callable[..., MLflowProcess], begun: list[str]) -> None:
    process = make(run_id="old")
    process.begin()
    assert (process.run_id, begun) == ("old", [])


def test_what_goes_wrong_there_is_told_here(make: Callable[..., MLflowProcess], begun: list[str]) -> None:
    process = make("down://")
    for _ in range(2):
        with pytest.raises(MLflowError, match=r"^ConnectionError: refused$"):
            process.begin()
    assert begun == ["new"], "a run that was made is remembered, whatever went wrong later"


def test_many_points_pass(make: Callable[..., MLflowProcess]) -> None:
    process = make()
    process.begin()
    for _ in range(3):
        process.log_points([("a/long/name/of/a/metric" * 10, 1.0, step, 1.0) for step in range(1_000)])
    with pytest.raises(MLflowError, match="3000 points"):
        process.finish()


def test_pictures_wait_for_their_turn(make: Callable[..., MLflowProcess], tmp_path: Path) -> None:
    process = make()
    process.queue_artifact(tmp_path / "a.png")
    process.begin()
    process.send_artifacts()
    assert (tmp_path / "a.png.logged").exists()


def test_a_process_that_died_is_started_again(make: Callable[..., MLflowProcess], begun: list[str]) -> None:
    process = make()
    process.begin()
    with pytest.raises(MLflowError, match="ended with exit code 3"):
        process.log_points([("die", 1.0, 1, 1.0)])
    process.begin_anew()
    process.begin()
    process.log_points([("x", 1.0, 1, 1.0)])
    assert begun == ["new"]


def test_killed_from_outside_between_two_questions(make: Callable[..., MLflowProcess]) -> None:
    process = make()
    process.begin()
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    process.log_points([("x", 1.0, 1, 1.0)])  # begun again, and nothing lost
    process._process.kill()
    process._process.wait()
    with pytest.raises(MLflowError, match="0 points"):
        process.finish()


def test_what_hangs_is_killed_from_another_thread(make: Callable[..., MLflowProcess]) -> None:
    process = make()
    process.begin()
    caught: list[MLflowError] = []

    def hang() -> None:
        try:
            process.log_points([("hang", 1.0, 1, 1.0)])
        except MLflowError as error:
            caught.append(error)

    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    process.kill()
    thread.join(5.0)
    assert caught
    with pytest.raises(MLflowError, match="was ended"):
        process.log_points([("x", 1.0, 1, 1.0)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_end_it(
    make: Callable[..., MLflowProcess], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_process, "END_S", 60.0)  # after which it would be killed
    process = make()
    process.begin()
    assert process._process is not None
    process._process.send_signal(number)
    time.sleep(0.2)
    process.log_points([("x", 1.0, 1, 1.0)])
    process.close()
    assert process._process.returncode == 0


def test_its_end_waits_for_nothing(make: Callable[..., MLflowProcess], poll_for: PollFor) -> None:
    process = make("slow://")

    def begin() -> None:
        with pytest.raises(MLflowError):
            process.begin()

    thread = threading.Thread(target=begin)
    thread.start()
    poll_for(lambda: process._process)
    time.sleep(0.3)
    assert process._process is not None
    assert process._process.stdin is not None
    process._process.stdin.close()  # as when the controller is gone
    assert process._process.wait(60.0) == 0
    thread.join(60.0)


def test_pictures_that_wait_too_long_are_counted(make: Callable[..., MLflowProcess], tmp_path: Path) -> None:
    process = make()
    for n in range(70):
        process.queue_artifact(tmp_path / f"{n}.png")
    assert process.artifacts_dropped == 6


def test_the_controllers_interpreter_never_holds_mlflow_and_leaves_no_process(
    tmp_path: Path, poll_for: PollFor
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ALIVE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        memory, imported, pid = map(int, holder.stdout.readline().split())
        assert memory > 1e7
        assert not imported
        assert psutil.pid_exists(pid)
        os.kill(holder.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    poll_for(lambda: not psutil.pid_exists(pid))  # it ends with its controller
