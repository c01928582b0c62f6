"""The living system as its user sees it: one command, pause and resume, new weights in the body, an orderly end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from processes import Process, System, poll_for, unchanged

from ami_controller.checkpoint_files import CheckpointFolder
from ami_shared.command import ONE_WISH_S
from ami_shared.config import build, load_config
from ami_shared.models.parameters import write_arrays
from ami_shared.records import RecordBatch

MakeSystem = Callable[..., System]

SAVES_AT_ITS_END_ONLY = "checkpoint.interval=null"


def test_one_command_runs_everything_and_shutdown_ends_it(make_system: MakeSystem) -> None:
    system = make_system()
    up = system.start("up")
    system.wait_running()
    poll_for(lambda: abs(system.service("body")["rate_hz"] - 10.0) < 0.5, what="ten steps a second")
    assert system.held_inputs() or poll_for(system.held_inputs, what="the avatar moves")
    poll_for(lambda: system.service("image_vae")["steps"] > 40, what="gradient steps")
    poll_for(lambda: system.model()["used"].get("body", 0) >= 2, what="a snapshot of the trainer in the body")
    done = system.ami("shutdown")
    assert done.returncode == 0, done.stderr
    assert "body" in done.stdout
    assert up.exit_code() == 0
    poll_for(lambda: not system.leftovers(), what="no process left")
    assert (system.run_dir / "metrics.jsonl").stat().st_size > 0


def test_ctrl_c_ends_everything_with_exit_code_0(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    up = system.start("up")
    system.wait_running()
    up.signal(signal.SIGINT)
    assert up.exit_code() == 0, up.output
    poll_for(lambda: not system.leftovers(), what="no process left")
    assert system.ami("status").returncode == 3


def start_whole(system: System) -> Process:
    """Start everything, and wait until `ami up` knows that the system runs as a whole: it saves no other."""
    up = system.start("up")
    poll_for(lambda: "running · " in up.output, 120, "a summary")
    return up


@pytest.mark.parametrize("experiment", ["noise", "simulated"])
def test_without_its_supervisor_a_system_saves_and_leaves_nothing_behind(
    make_system: MakeSystem, experiment: str
) -> None:
    system = make_system(f"experiment={experiment}", SAVES_AT_ITS_END_ONLY)
    up = start_whole(system)
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    up.kill()
    poll_for(lambda: not system.leftovers(), what="children end when their supervisor is gone")
    (saved,) = CheckpointFolder(system.run_dir / "checkpoints").names()
    assert saved


def test_a_trainer_that_died_just_before_the_end_is_started_again_for_the_save(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise", SAVES_AT_ITS_END_ONLY)
    up = start_whole(system)
    os.kill(system.service("image_vae")["pid"], signal.SIGKILL)
    poll_for(lambda: "image_vae was killed" in up.output)
    up.signal(signal.SIGINT)
    assert up.exit_code() == 0, up.output
    assert "without a save" not in up.output
    assert len(CheckpointFolder(system.run_dir / "checkpoints").names()) == 1
    poll_for(lambda: not system.leftovers(), what="no process left")


def test_a_controller_that_dies_at_the_end_is_started_again_for_the_save(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise", SAVES_AT_ITS_END_ONLY)
    up = start_whole(system)
    (controller,) = [p for p in psutil.Process(up.pid).children() if "ami_controller.main" in p.cmdline()]
    controller.kill()
    up.signal(signal.SIGINT)
    assert up.exit_code() == 0, up.output
    assert "without a save" not in up.output
    assert len(CheckpointFolder(system.run_dir / "checkpoints").names()) == 1


def test_a_second_ctrl_c_ends_everything_without_a_save(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise", SAVES_AT_ITS_END_ONLY)
    up = start_whole(system)
    trainer = system.service("image_vae")["pid"]
    os.kill(trainer, signal.SIGSTOP)  # the save waits for it
    try:
        up.signal(signal.SIGINT)
        poll_for(lambda: "saving before the end" in up.output)
        time.sleep(2 * ONE_WISH_S)
        up.signal(signal.SIGINT)
        assert up.exit_code() == 128 + signal.SIGINT
    finally:
        os.kill(trainer, signal.SIGCONT)
    poll_for(lambda: not system.leftovers(), what="no process left")
    assert CheckpointFolder(system.run_dir / "checkpoints").names() == []


def test_who_is_abandoned_by_the_controller_too_does_not_wait_for_it(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    up = system.start("up")
    system.wait_running()
    (controller,) = [p for p in psutil.Process(up.pid).children() if "ami_controller.main" in p.cmdline()]
    up.kill()
    controller.kill()
    poll_for(lambda: not system.leftovers(), what="no process left")


def movements(system: System) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return the steps of all services, the versions of all models, and about where the avatar is."""
    told = system.status()
    steps = {service["name"]: service["steps"] for service in told["services"]}
    versions = {model["name"]: model["version"] for model in told["models"]}
    return steps, versions, {axis: round(at) for axis, at in system.world()["position"].items()}


def test_pause_stands_still_and_resume_goes_on_with_the_held_action(make_system: MakeSystem) -> None:
    system = make_system("inference.agent.mean_hold_steps=100000", "seed=4")
    system.start("up")
    system.wait_running()
    held = poll_for(system.held_inputs, what="the avatar moves")
    segment = system.service("body")["segment"]
    poll_for(lambda: system.service("image_vae")["steps"] > 5, what="training")

    paused = system.command("pause")
    assert "body" in paused.stdout
    assert "image_vae" in paused.stdout
    assert system.status()["system"] == "paused"
    poll_for(lambda: not system.held_inputs(), what="neutral in the world")
    steps, *_ = unchanged(lambda: movements(system), for_s=2.0)

    system.command("resume")
    poll_for(lambda: system.held_inputs() == held, what="the held action, whole")
    poll_for(lambda: system.service("body")["segment"] > segment, what="a new segment")
    poll_for(lambda: system.service("image_vae")["steps"] > steps["image_vae"], what="training again")


def test_a_pause_outlives_the_controller_and_the_whole_system(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    controller = system.start("controller")
    system.start("body")
    system.start("image_vae")
    system.wait_running()
    system.command("pause")
    controller.kill()
    system.start("controller")
    poll_for(lambda: system.ami("status", "--json").returncode == 0, what="controller back")
    poll_for(lambda: system.service("body")["state"] == "paused", what="body back in a paused system")
    steps = system.service("body")["steps"]
    assert system.ami("shutdown").returncode == 0
    for process in system.processes[1:]:
        assert process.exit_code() == 0
    up = system.start("up")
    poll_for(lambda: "system is paused" in up.output, what="told at start")
    system.wait_for_state("body", "paused")
    assert system.service("body")["steps"] == 0
    assert steps > 0
    system.command("resume")
    system.wait_running()


def test_the_body_uses_the_very_weights_that_the_trainer_published(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise", "trainers.image_vae.service.publish_interval=0.2")
    system.start("up")
    system.wait_running()
    encoder = build(load_config(system.overrides).models.image_encoder, "models.image_encoder").eval()
    batches: list[RecordBatch] = []
    with system.following() as snapshots, system.listening() as collect:  # the same bytes over the wire

        def five_in_both() -> bool:
            batches.extend(collect(1.0))
            used = {int(version) for batch in batches for version in batch.versions["image_encoder"]}
            return len(used & snapshots.keys()) >= 5

        poll_for(five_in_both, 60.0, "five versions, published and used")

    compared = set()
    versions = np.concatenate([batch.versions["image_encoder"] for batch in batches])
    assert (np.diff(versions) >= 0).all()
    for batch in batches:
        for i, version in enumerate(batch.versions["image_encoder"]):
            if int(version) not in snapshots:
                continue
            write_arrays(encoder, snapshots[int(version)].arrays)
            with torch.inference_mode():
                expected = encoder(torch.from_numpy(np.array(batch.data["observation"][i : i + 1])))[0].numpy()
            np.testing.assert_allclose(batch.data["embedding"][i], expected, rtol=1e-4, atol=1e-5)
            compared.add(int(version))
    assert len(compared) >= 5
    everything = [n for batch in batches for n in range(batch.first_sequence, batch.first_sequence + len(batch))]
    assert everything == list(range(everything[0], everything[0] + len(everything)))


def test_a_part_that_is_told_to_end_comes_back(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    up = system.start("up")
    system.wait_running()
    before = system.service("body")["pid"]
    os.kill(before, signal.SIGTERM)
    poll_for(lambda: system.service("body").get("pid") not in (None, before), what="the body is back")
    system.wait_running()
    assert "body was ended by SIGTERM; starting it again" in up.output
    assert system.ami("shutdown").returncode == 0
    assert up.exit_code() == 0, up.output


def test_a_body_that_is_taken_over_leaves_the_rest_alive(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise")
    up = system.start("up")
    system.wait_running()
    before = system.service("body")["pid"]
    other = system.start("body", "--take-over")
    poll_for(lambda: system.service("body").get("pid") == other.pid, what="it has the name")
    poll_for(lambda: "body stays down" in up.output, what="it is said")
    system.wait_running()
    published = system.status()["experience"][0]["received"]["image_vae"]
    poll_for(lambda: system.status()["experience"][0]["received"]["image_vae"] > published + 10, what="life goes on")
    assert up.popen.poll() is None
    assert not psutil.pid_exists(before)
    assert system.ami("shutdown").returncode == 0
    assert (up.exit_code(), other.exit_code()) == (0, 0), up.output
