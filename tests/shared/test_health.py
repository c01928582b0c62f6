from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from ami_shared.command import exit_code
from ami_shared.health import FRESH_S, LOOP_STUCK_S, HealthFile, health_path, read_health


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "body-body.json"


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """A time that stands still: no report grows old while a test is held up."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    return now


def rewrite(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_fresh_report_of_a_moving_loop_is_healthy(path: Path) -> None:
    HealthFile(path).write("running", 0.1, linked=True)
    assert read_health(path) == (True, f"running, pid {os.getpid()}, hub linked")


def test_a_service_without_its_hub_is_healthy_and_says_so(path: Path) -> None:
    HealthFile(path).write("running", 0.1, linked=False)
    healthy, line = read_health(path)
    assert healthy
    assert "hub not linked" in line


SERVICES_OF_LONG_AGO = """
import os, time
from ami_inference.service import Body
from ami_shared.config import load_config
from ami_trainer.service import TrainerService
body = Body(load_config(["experiment=noise"]))
trainer = TrainerService(load_config(["experiment=noise", "trainer=image_vae"]))
for service, loop in ((body, body.interaction), (trainer, trainer.training)):
    loop.moved_at -= 1_000.0
    for service._living in (False, True):
        print(time.monotonic() - service.link._hooks.loop_moved_at(), flush=True)
os._exit(0)
"""


def test_who_waits_for_the_controller_has_no_loop_yet_that_could_stand_still(configs: Path) -> None:
    made = subprocess.run([sys.executable, "-c", SERVICES_OF_LONG_AGO], capture_output=True, text=True, check=True)
    assert [float(age) > LOOP_STUCK_S for age in made.stdout.split()] == [False, True, False, True]


def test_no_report_is_not_healthy(path: Path) -> None:
    healthy, line = read_health(path)
    assert not healthy
    assert "not running" in line


def test_a_stale_report_is_not_healthy(path: Path, now: float) -> None:
    HealthFile(path).write("running", 0.1, linked=True)
    rewrite(path, time=now - FRESH_S - 1)
    healthy, line = read_health(path)
    assert not healthy
    assert "6 s ago" in line


def test_a_report_of_the_future_is_not_healthy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was set back, and whoever wrote it has not written since."""
    HealthFile(path).write("running", 0.1, True)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3_600.0)
    healthy, line = read_health(path)
    assert not healthy
    assert "the clock was set back" in line


def test_a_stuck_loop_is_not_healthy(path: Path) -> None:
    HealthFile(path).write("running", LOOP_STUCK_S + 1, linked=True)
    healthy, line = read_health(path)
    assert not healthy
    assert "has not moved for 31 s" in line


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"time": "now"}', '{"time": null}', "\xff"])
def test_a_broken_report_is_not_healthy(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_bytes(text.encode("latin-1"))
    healthy, line = read_health(path)
    assert not healthy
    assert "\n" not in line


def test_a_report_replaces_the_last_one_and_leaves_nothing_beside_it(path: Path) -> None:
    HealthFile(path).write("running", 0.0, linked=True)
    HealthFile(path).write("paused", 0.0, linked=True)
    assert read_health(path)[1].startswith("paused")
    assert list(path.parent.iterdir()) == [path]


def test_the_report_of_another_process_of_that_name_is_left_alone(path: Path) -> None:
    file = HealthFile(path)
    file.write("running", 0.0, linked=True)
    rewrite(path, pid=1)
    file.remove()
    assert path.exists()
    file.write("running", 0.0, linked=True)
    file.remove()
    assert not path.exists()


def test_a_machine_on_which_nothing_can_be_written_holds_no_service_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_folder() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    monkeypatch.setenv("TMPDIR", "/proc/nothing")
    HealthFile(health_path(5550, "body", "body")).write("running", 0.0, True)
    assert "--health cannot report this service" in caplog.text
    assert exit_code("test", lambda: 1 // 0) == 1


def test_services_of_one_machine_have_reports_of_their_own() -> None:
    services = ((5550, "body", "a"), (5550, "body", "b"), (5550, "trainer", "a"), (5560, "body", "a"))
    assert len({health_path(*service) for service in services}) == 4


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders of Windows have no mode")
def test_a_folder_that_others_can_write_to_is_neither_written_to_nor_believed(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    victim = path.parent.parent / "victim"
    victim.write_text("precious")
    path.parent.mkdir()
    path.parent.chmod(0o777)
    path.with_name(f"{path.name}.{os.getpid()}.tmp").symlink_to(victim)
    file = HealthFile(path)
    for _ in range(3):
        file.write("running", 0.0, linked=True)
    assert victim.read_text() == "precious"
    assert len(caplog.records) == 1, "it is said once"
    path.write_text(json.dumps({"pid": 1, "time": time.time(), "state": "running", "loop_age_s": 0, "linked": True}))
    healthy, line = read_health(path)
    assert not healthy
    assert "can be written to by others" in line
