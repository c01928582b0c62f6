"""Any start order, and kill -9 of anything: what remains goes on, and what returns finds its place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import System, poll_for

from ami_shared.priority import set_thread_priority
from ami_shared.records import RecordBatch

MakeSystem = Callable[..., System]
NAMES = ("controller", "body", "image_vae")


def keeps_its_grid(system: System, begin_s: float, before: dict[str, Any]) -> bool:
    """Whether the body took, or counted as skipped, a tick for each tenth of a second since it told of `before`."""
    now = system.service("body")
    gone_by = sum((now[of] or 0) - before[of] for of in ("steps", "skipped_ticks"))
    return abs(gone_by - 10 * (time.monotonic() - begin_s)) < 40  # what it tells may be seconds old


@pytest.mark.parametrize(
    "order",
    [
        (1, 2, 0),
        (2, 0, 1),
        *(pytest.param(order, marks=pytest.mark.slow) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0))),
    ],
    ids=lambda order: "-".join(NAMES[i] for i in order),
)
def test_any_start_order_comes_up(make_system: MakeSystem, order: tuple[int, ...]) -> None:
    system = make_system("experiment=noise")
    for index in order:
        system.start(NAMES[index])
        time.sleep(2.0)
    system.wait_running()


def test_a_killed_controller_holds_up_no_body_and_heals(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    controller = system.start("controller")
    body, trainer = system.start("body"), system.start("image_vae")
    system.wait_running()
    version = poll_for(lambda: system.model()["version"])
    run = poll_for(lambda: system.status()["tracker"]["mlflow_run"], 120, "an MLflow run")
    before, begin_s = system.service("body"), time.monotonic()
    controller.kill()
    time.sleep(3.0)
    assert body.popen.poll() is None
    assert trainer.popen.poll() is None
    system.start("controller")
    system.wait_running()
    told = poll_for(lambda: (body := system.service("body"))["steps"] and body, what="the body tells of itself")
    assert told["steps"] >= before["steps"] + 15, "the body went on acting without a controller"
    poll_for(lambda: keeps_its_grid(system, begin_s, before), what="no tick is missing")
    poll_for(lambda: system.model()["version"] > version, what="versions go on growing")
    told = poll_for(lambda: (told := system.status()["tracker"])["written"] and told, 120, "MLflow is written to")
    assert told["mlflow_run"] == run


def test_a_killed_trainer_goes_on_from_what_it_had_learned(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    system.start("controller")
    system.start("body")
    trainer = system.start("image_vae")
    system.wait_running()
    version = poll_for(lambda: [m for m in system.status()["models"] if m["version"] > 8], 30)[0]["version"]
    before, begin_s = system.service("body"), time.monotonic()
    trainer.kill()
    system.wait_for_state("image_vae", "lost")
    assert system.service("body")["state"] == "running"
    system.start("image_vae")
    system.wait_for_state("image_vae", "running")
    poll_for(lambda: system.model()["used"].get("body", 0) > version, what="newer weights in the body")
    poll_for(lambda: keeps_its_grid(system, begin_s, before), what="no tick is missing")
    now = system.service("body")
    assert now["skipped_ticks"] - before["skipped_ticks"] < now["steps"] - before["steps"], "acting did not wait"
    assert "image_encoder continues from version" in system.processes[-1].output


def test_a_killed_body_leaves_the_avatar_at_rest_and_returns_with_learned_weights(make_system: MakeSystem) -> None:
    system = make_system("inference.agent.mean_hold_steps=100000", "seed=4")
    for name in ("world", "controller", "image_vae"):
        system.start(name)
    body = system.start("body")
    system.wait_running()
    poll_for(system.held_inputs, what="the avatar moves")
    poll_for(lambda: [m for m in system.status()["models"] if m["version"] > 2])
    body.kill()
    poll_for(lambda: not system.held_inputs(), what="neutral when the body died")
    with system.listening() as collect:
        second = system.start("body")
        poll_for(lambda: system.service("body").get("pid") == second.pid, what="the new body has joined")
        batches = poll_for(lambda: collect(0.5), what="records of the new body")
    assert batches[0].first_sequence == 0
    assert batches[0].versions["image_encoder"][0] > 0, "its first step used learned weights"


def test_a_stopped_body_leaves_the_avatar_at_rest(make_system: MakeSystem) -> None:
    system = make_system("inference.agent.mean_hold_steps=100000", "seed=4")
    for name in ("world", "controller", "image_vae"):
        system.start(name)
    body = system.start("body")
    system.wait_running()
    poll_for(system.held_inputs, what="the avatar moves")
    body.signal(signal.SIGSTOP)
    poll_for(lambda: not system.held_inputs(), what="neutral within max_silence")
    system.wait_for_state("body", "lost")
    body.signal(signal.SIGCONT)
    system.wait_for_state("body", "running")
    poll_for(system.held_inputs, what="the avatar moves again")


def test_a_world_that_vanishes_blinds_the_body_until_it_returns(make_system: MakeSystem) -> None:
    system = make_system()
    world = system.start("world")
    for name in ("controller", "image_vae", "body"):
        system.start(name)
    system.wait_running()
    segment = system.service("body")["segment"]
    world.kill()
    system.wait_for_state("body", "blind")
    assert "camera" in system.service("body")["trouble"]
    system.start("world")
    system.wait_for_state("body", "running")
    poll_for(lambda: system.service("body")["segment"] > segment, what="a new segment")


def test_up_restarts_what_dies(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    up = system.start("up")
    system.wait_running()
    import os

    for name in ("image_vae", "body"):
        old = system.service(name)["pid"]
        os.kill(old, signal.SIGKILL)
        poll_for(lambda n=name, p=old: system.service(n).get("pid", p) != p, what=f"{name} again")
    system.wait_running()
    assert "was killed by SIGKILL" in up.output


def on_the_grid(batches: list[RecordBatch]) -> bool:
    """Whether the grid does not drift, no tick is taken twice, and hardly one skipped: other tests run beside."""
    times = np.concatenate([batch.times for batch in batches])
    numbers = np.round((times - times[0]) / 0.1)
    off = times - times[0] - numbers * 0.1
    steady = abs(off[-20:].min() - off[:20].min()) < 0.005
    whole = len(np.unique(numbers)) >= max(len(numbers) - 1, numbers[-1] - 3)
    return bool(steady and whole and numbers[-1] > 100)


def test_ticks_stay_on_the_grid_while_training(make_system: MakeSystem) -> None:
    service = "trainers.image_vae.service"
    training = ("trainers.image_vae.updates_per_record=1000", f"{service}.priority=idle", f"{service}.threads=3")
    system = make_system("experiment=noise", *training)
    system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 0, 30, "gradient steps")
    with system.listening() as collect:
        assert any(on_the_grid(collect(12.0)) for _ in range(10)), "one stretch at least is not held up by others"
    if hasattr(os, "SCHED_IDLE"):
        policies = []
        for task in Path(f"/proc/{system.service('image_vae')['pid']}/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended by now
                policies.append(os.sched_getscheduler(int(task.name)))
        assert policies.count(os.SCHED_IDLE) >= 3, "torch's pool, too"
        with ThreadPoolExecutor(1) as a_thread:
            permitted = a_thread.submit(set_thread_priority, "realtime").result() == "realtime"
        policy = os.sched_getscheduler(system.service("body")["pid"])  # of its first thread, which is the loop's
        assert (policy == os.SCHED_RR | os.SCHED_RESET_ON_FORK) == permitted
