"""`docker compose up` for real. The tests are one life, in order: up, paused, resumed, killed, ended, up again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from stack import Stack, can_give_rtprio, poll_for

pytestmark = pytest.mark.docker

AMI_SERVICES = ("controller", "inference", "trainer", "trainer-dynamics", "trainer-ppo")
USER_ID = "10001"
METRICS = ("body/observation_age_ms", "image_vae/loss")
TRAINERS = ("image_vae", "forward_dynamics", "ppo")
START_S = 150.0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack("ami-test", AMI_RTPRIO=str(int(can_give_rtprio()))) as stack:
        yield stack


@pytest.fixture(scope="module")
def vrchat_stack() -> Iterator[Stack]:
    """VRChat's part is played by the simulated world's container: a camera at a URL, and OSC."""
    with Stack("ami-test-vrchat", AMI_CAMERA="http://world:8080/video.mjpg", AMI_OSC_HOST="world") as stack:
        yield stack


@pytest.fixture(autouse=True)
def logs_of_failures(request: pytest.FixtureRequest) -> Iterator[None]:
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        for name in {"stack", "vrchat_stack"} & set(request.fixturenames):
            request.getfixturevalue(name).show_logs()


def service(status: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(next(about for about in status["services"] if about["name"] == name))


def received(status: dict[str, Any]) -> int:
    return int(status["experience"][0]["received"]["image_vae"])


def version(status: dict[str, Any]) -> int:
    return int(next(model["version"] for model in status["models"] if model["name"] == "image_encoder"))


def used_version(status: dict[str, Any]) -> int:
    """The version that the body acts with."""
    return int(next(model["used"]["body"] for model in status["models"] if model["name"] == "image_encoder"))


def all_run(stack: Stack) -> dict[str, Any]:
    """Return the status if everybody runs, and something is learned and used."""
    status = stack.status()
    states = {about["name"]: about["state"] for about in status["services"]}
    assert states == dict.fromkeys(("body", *TRAINERS), "running"), str(states)
    assert status["system"] == "running"
    assert used_version(status) > 1, "no version in use yet"
    return status


def is_moving(world: dict[str, Any]) -> bool:
    return any(world["inputs"][axis] for axis in ("vertical", "horizontal", "look_horizontal"))


def place(stack: Stack) -> tuple[Any, ...]:
    world = stack.world()
    return (*world["position"].values(), world["angle_deg"])


def mlflow_run(stack: Stack) -> dict[str, Any]:
    experiments = stack.mlflow("experiments/search", {"max_results": 100})["experiments"]
    ours = next(about["experiment_id"] for about in experiments if about["name"] == "ami-simulated")
    (run,) = stack.mlflow("runs/search", {"experiment_ids": [ours]})["runs"]
    return dict(run)


def metric_steps(stack: Stack) -> dict[str, int]:
    """The newest step of two metrics, one of the body and one of the trainer."""
    steps = {metric["key"]: int(metric["step"]) for metric in mlflow_run(stack)["data"]["metrics"]}
    return {key: steps[key] for key in METRICS}


def test_plain_up_starts_everything_and_all_become_healthy(stack: Stack) -> None:
    stack.compose("build")
    stack.compose("up", "-d")

    poll_for("a running system", lambda: all_run(stack), START_S)

    def healthy() -> bool:
        states = {name: about["State"]["Health"]["Status"] for name, about in stack.containers().items()}
        assert set(states) == {*AMI_SERVICES, "world", "mlflow"}, str(states)
        assert set(states.values()) == {"healthy"}, str(states)
        return True

    poll_for("health", healthy, 60)


def test_the_body_keeps_its_ten_steps_a_second(stack: Stack) -> None:
    first, begin = service(stack.status(), "body"), time.monotonic()
    time.sleep(10)
    last, end = service(stack.status(), "body"), time.monotonic()

    assert (last["steps"] - first["steps"]) / (end - begin) == pytest.approx(10, rel=0.1)
    assert last["rate_hz"] == pytest.approx(10, rel=0.15)


def realtime_processes(stack: Stack, service: str) -> int:
    """How many processes of a service's container are real-time."""
    look = "[p for p in os.listdir('/proc') if p.isdigit() and os.sched_getscheduler(int(p)) & 0xff == os.SCHED_RR]"
    return int(stack.execute(service, "python", "-c", f"import os; print(len({look}))"))


def test_the_body_is_real_time_if_that_is_permitted(stack: Stack) -> None:
    assert realtime_processes(stack, "inference") == int(can_give_rtprio())
    assert realtime_processes(stack, "trainer") == 0


def test_experience_reaches_the_trainer_and_its_versions_reach_the_body(stack: Stack) -> None:
    before = stack.status()

    def grown() -> bool:
        now = stack.status()
        assert received(now) > received(before) + 30, f"{received(now)} records"
        assert version(now) > version(before) + 2, f"version {version(now)}"
        return used_version(now) > version(before) + 1

    poll_for("more records and versions", grown, 60)
    assert stack.status()["experience"][0]["lost"] == dict.fromkeys(TRAINERS, 0)


def test_the_world_moves(stack: Stack) -> None:
    before = place(stack)

    poll_for("another position", lambda: place(stack)[:2] != before[:2], 20)


def test_metrics_and_pictures_arrive_in_mlflow(stack: Stack) -> None:
    before = poll_for("metrics of both services", lambda: metric_steps(stack), 60)

    def later() -> bool:
        now = metric_steps(stack)
        return all(now[key] > before[key] for key in METRICS)

    poll_for("metrics of later steps", later, 60)

    run_id = mlflow_run(stack)["info"]["run_id"]
    pictures = f"artifacts/list?run_id={run_id}&path=pictures"
    poll_for("a picture", lambda: stack.mlflow(pictures).get("files"), 120)


def test_no_container_runs_as_root_or_can_write_its_own_files(stack: Stack) -> None:
    for name, about in stack.containers().items():
        assert stack.execute(name, "id", "-u") == USER_ID, name
        assert about["HostConfig"]["ReadonlyRootfs"], name
        assert about["HostConfig"]["CapDrop"] == ["ALL"], name
        status = stack.execute(name, "cat", "/proc/1/status")
        assert "CapEff:\t0000000000000000" in status, name
        assert "NoNewPrivs:\t1" in status, name


def test_the_hub_has_keys_and_every_container_one_secret_of_its_own(stack: Stack) -> None:
    assert stack.status()["hub"]["security"] == "keys"
    held = {name: stack.execute(name, "cat", "/key/key.json") for name in AMI_SERVICES}
    secrets = {name: json.loads(text)["secret"] for name, text in held.items()}
    assert len(set(secrets.values())) == len(AMI_SERVICES)
    for name in set(AMI_SERVICES) - {"controller"}:
        assert stack.execute(name, "sh", "-c", "ls /keys /carry 2>/dev/null || true") == ""
        assert not [other for other, secret in secrets.items() if secret in str(stack.containers()[name]["Config"])]


def test_only_the_loopback_interface_of_the_host_is_listened_on(stack: Stack) -> None:
    for name, about in stack.containers().items():
        for bindings in about["HostConfig"]["PortBindings"].values():
            assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}, name


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("controller", ["torch", "cv2", "pythonosc", "vizdoom"]),
        ("trainer", ["cv2", "pythonosc", "mlflow", "vizdoom"]),
        ("inference", ["mlflow", "vizdoom"]),
        ("world", ["torch", "mlflow"]),
    ],
)
def test_an_image_holds_only_what_its_service_needs(stack: Stack, name: str, absent: list[str]) -> None:
    code = f"import importlib.util as u; print([m for m in {absent} if u.find_spec(m)])"

    assert stack.execute(name, "python", "-c", code) == "[]"


def test_pause_lets_everything_stand_still_and_resume_lets_it_go_on(stack: Stack) -> None:
    stack.ami("pause")
    time.sleep(2)  # the avatar slides to a halt
    before, there = stack.status(), place(stack)
    time.sleep(4)
    after = stack.status()

    assert before["system"] == after["system"] == "paused"
    assert place(stack) == there
    assert version(after) == version(before)
    assert service(after, "body")["steps"] == service(before, "body")["steps"]

    stack.ami("resume")

    poll_for("another position", lambda: place(stack)[:2] != there[:2], 20)
    poll_for("newer versions", lambda: version(stack.status()) > version(after) + 1, 30)


def test_a_killed_body_lets_go_at_once_and_comes_back(stack: Stack) -> None:
    restarts = stack.containers()["inference"]["RestartCount"]
    pid = service(stack.status(), "body")["pid"]
    poll_for("a moving avatar", lambda: is_moving(stack.world()), 20)

    stack.execute("inference", "python", "-c", f"import os; os.kill({pid}, 9)")
    killed_at = time.monotonic()

    poll_for("an avatar at rest", lambda: not is_moving(stack.world()), 2)
    poll_for("a restart", lambda: stack.containers()["inference"]["RestartCount"] == restarts + 1, 20)

    def reborn() -> dict[str, Any]:
        status = all_run(stack)
        assert service(status, "body")["uptime_s"] < time.monotonic() - killed_at, "the old one, still"
        return status

    records = received(poll_for("the body's return", reborn, 60))
    poll_for("more records", lambda: received(stack.status()) > records + 20, 30)


def test_shutdown_ends_all_with_exit_code_0_and_they_stay_down(stack: Stack) -> None:
    stack.status()
    stack.ami("shutdown")

    def ended() -> bool:
        states = {name: stack.containers()[name]["State"] for name in AMI_SERVICES}
        told = {name: (state["Status"], state["ExitCode"]) for name, state in states.items()}
        assert all(state == ("exited", 0) for state in told.values()), str(told)
        return True

    poll_for("the end of all services", ended, 30)
    time.sleep(5)
    assert ended()
    assert {stack.containers()[name]["State"]["Status"] for name in ("world", "mlflow")} == {"running"}


def test_up_again_goes_on_with_the_same_record_and_growing_versions(stack: Stack) -> None:
    before, run_id = stack.last_status, mlflow_run(stack)["info"]["run_id"]

    stack.compose("up", "-d")

    after = poll_for("a running system", lambda: all_run(stack), START_S)
    assert version(after) > version(before)
    assert mlflow_run(stack)["info"]["run_id"] == run_id


def test_a_stack_that_was_killed_goes_on_from_its_last_checkpoint(stack: Stack) -> None:
    before, run_id = stack.status(), mlflow_run(stack)["info"]["run_id"]
    stack.ami("save", "--wait")
    name = stack.status()["hub"]["checkpoint"]["newest"]
    stack.kill_everything()

    stack.compose("up", "-d")

    after = poll_for("a running system", lambda: all_run(stack), START_S)
    assert after["hub"]["checkpoint"]["newest"] >= name
    assert service(after, "body")["steps"] >= service(before, "body")["steps"]
    assert service(after, "image_vae")["buffer"]["fill"] >= service(before, "image_vae")["buffer"]["fill"]
    assert service(after, "image_vae")["steps"] >= service(before, "image_vae")["steps"]
    assert version(after) >= version(before)
    assert mlflow_run(stack)["info"]["run_id"] == run_id


def test_profile_vrchat_runs_without_the_world_on_a_camera_and_an_osc_host_from_outside(
    stack: Stack, vrchat_stack: Stack
) -> None:
    stack.remove()

    vrchat_stack.compose("up", "-d", "--no-deps", "world")
    vrchat_stack.compose("--profile", "vrchat", "up", "-d")

    expected = {f"{name}-vrchat" for name in AMI_SERVICES}
    assert set(vrchat_stack.containers()) == {"mlflow", "world", *expected}
    poll_for("a running system", lambda: all_run(vrchat_stack), START_S)
    assert realtime_processes(vrchat_stack, "inference-vrchat") == 0, "nobody has permitted it"
    here = place(vrchat_stack)
    poll_for("a moving avatar", lambda: place(vrchat_stack)[:2] != here[:2], 20)
