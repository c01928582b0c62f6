"""Any start order, and kill -9 of anything: what remains goes on, and what returns finds its place."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
from processes import System, poll_for

MakeSystem = Callable[..., System]
NAMES = ("controller", "body", "image_vae")


@pytest.mark.parametrize(
    "order",
    [
        (1, 2, 0),
        (2, 0, 1),
        *(pytest.param(order, marks=pytest.mark.slow) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0))),
    ],
    ids=lambda order: "-".join(NAMES[i] for i in order),
)
def test_any_start_order_comes_up_within_10_s_of_the_last(make_system: MakeSystem, order: tuple[int, ...]) -> None:
    system = make_system("experiment=noise")
    for index in order:
        system.start(NAMES[index])
        time.sleep(2.0)
    system.wait_running(10.0)


def test_a_killed_controller_costs_the_body_no_tick_and_heals(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    controller = system.start("controller")
    body, trainer = system.start("body"), system.start("image_vae")
    before = system.wait_running()
    version = poll_for(lambda: system.model()["version"], 10)
    run = poll_for(lambda: system.status()["tracker"]["mlflow_run"], 30, "an MLflow run")
    steps, skipped = system.service("body")["steps"], before["services"][0]["skipped_ticks"]
    begin = time.monotonic()
    controller.kill()
    time.sleep(3.0)
    assert body.popen.poll() is None
    assert trainer.popen.poll() is None
    system.start("controller")
    system.wait_running(15.0)
    now = system.service("body")
    expected = steps + 10 * (time.monotonic() - begin)
    assert now["steps"] == pytest.approx(expected, abs=12), "the body went on acting without a controller"
    assert now["skipped_ticks"] <= skipped + 1
    poll_for(lambda: system.model()["version"] > version, 10, "versions go on growing")
    told = poll_for(lambda: (told := system.status()["tracker"])["written"] and told, 30, "MLflow is written to")
    assert told["mlflow_run"] == run


def test_a_killed_trainer_goes_on_from_what_it_had_learned(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    system.start("controller")
    system.start("body")
    trainer = system.start("image_vae")
    system.wait_running()
    version = poll_for(lambda: [m for m in system.status()["models"] if m["version"] > 8], 30)[0]["version"]
    skipped = system.service("body")["skipped_ticks"]
    trainer.kill()
    system.wait_for_state("image_vae", "lost")
    assert system.service("body")["state"] == "running"
    system.start("image_vae")
    system.wait_for_state("image_vae", "running")
    poll_for(lambda: system.model()["used"].get("body", 0) > version, 15, "newer weights in the body")
    assert system.service("body")["skipped_ticks"] <= skipped + 1
    assert "image_encoder goes on from version" in system.processes[-1].output


def test_a_killed_body_leaves_the_avatar_at_rest_and_returns_with_learned_weights(make_system: MakeSystem) -> None:
    system = make_system("inference.agent.mean_hold_steps=100000", "seed=4")
    for name in ("world", "controller", "image_vae"):
        system.start(name)
    body = system.start("body")
    system.wait_running()
    poll_for(system.held_inputs, 10, "the avatar moves")
    poll_for(lambda: [m for m in system.status()["models"] if m["version"] > 2], 20)
    body.kill()
    killed_at = time.monotonic()
    poll_for(lambda: not system.held_inputs(), 2.0, "neutral when the body died")
    assert time.monotonic() - killed_at < 1.0
    with system.listening() as collect:
        second = system.start("body")
        poll_for(lambda: system.service("body").get("pid") == second.pid, 20, "the new body has joined")
        batches = collect(3.0)
    assert batches[0].first_sequence == 0
    assert batches[0].versions["image_encoder"][0] > 0, "its first step used learned weights"


def test_a_stopped_body_leaves_the_avatar_at_rest(make_system: MakeSystem) -> None:
    system = make_system("inference.agent.mean_hold_steps=100000", "seed=4")
    for name in ("world", "controller", "image_vae"):
        system.start(name)
    body = system.start("body")
    system.wait_running()
    poll_for(system.held_inputs, 10, "the avatar moves")
    body.signal(signal.SIGSTOP)
    poll_for(lambda: not system.held_inputs(), 2.0, "neutral within max_silence")
    system.wait_for_state("body", "lost")
    body.signal(signal.SIGCONT)
    system.wait_for_state("body", "running")
    poll_for(system.held_inputs, 3, "the avatar moves again")


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
    system.wait_for_state("body", "running", 20)
    poll_for(lambda: system.service("body")["segment"] == segment + 1, 5, "a new segment")


def test_up_restarts_what_dies(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    up = system.start("up")
    system.wait_running()
    import os

    for name in ("image_vae", "body"):
        old = system.service(name)["pid"]
        os.kill(old, signal.SIGKILL)
        poll_for(lambda n=name, p=old: system.service(n).get("pid", p) != p, 15, f"{name} again")
    system.wait_running()
    assert "was killed by SIGKILL" in up.output


def test_ticks_stay_on_the_grid_while_training(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise", "trainers.image_vae.updates_per_record=1000")
    system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 0, 30, "gradient steps")
    with system.listening() as collect:
        batches = collect(12.0)
    times = np.concatenate([batch.times for batch in batches])
    numbers = np.round((times - times[0]) / 0.1)
    off = times - times[0] - numbers * 0.1
    assert abs(off[-20:].min() - off[:20].min()) < 0.005, "the grid does not drift"
    assert numbers[-1] > 100
    assert len(np.unique(numbers)) >= max(len(numbers) - 1, numbers[-1]), "no tick is skipped, none taken twice"
