"""The whole living system saved and restored, with real processes."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from processes import System, one_error_line, poll_for

from ami_controller.checkpoint_files import CheckpointFolder
from ami_shared.records import RecordBatch
from ami_shared.settled import is_window_end
from ami_shared.state import from_files

MakeSystem = Callable[..., System]

NOISE = ("experiment=noise", "checkpoint.interval=null")
CURIOUS = (
    "experiment=noise",
    "inference/agent=curious",
    "+trainers@trainers.forward_dynamics=forward_dynamics",
    "+trainers@trainers.ppo=ppo",
    "pace=lockstep",
    "lockstep_window=50",
    "observation.height=42",
    "observation.width=42",
    "trainers.ppo.rollout_length=64",
    "checkpoint.interval=null",
    "checkpoint.at_shutdown=false",
)


def folder(system: System) -> CheckpointFolder:
    return CheckpointFolder(system.run_dir / "checkpoints")


def tree(system: System, checkpoint: str, name: str) -> dict[str, Any]:
    """Return one tree of a checkpoint."""
    of, there = folder(system), folder(system).manifest(checkpoint).files
    paths = [path for path in (f"{name}.json", f"{name}.safetensors") if path in there]
    return from_files(name, {path: of.read_whole(checkpoint, path) for path in paths})


def lost(system: System) -> int:
    """Return how many of the body's records the trainer lost."""
    return sum(stream["lost"].get("image_vae", 0) for stream in system.status()["experience"])


def behind(system: System) -> int:
    """Return how many records the body is ahead of the trainer's buffer."""
    return int(system.service("body")["steps"] - system.service("image_vae")["buffer"]["seen"])


def save(system: System, name: str) -> None:
    system.command("save", "--name", name, "--wait")


def test_a_killed_system_goes_on_where_it_was_saved(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 60, 60, "gradient steps")
    save(system, "one")
    loop, trainer = tree(system, "one", "interaction/body/loop"), tree(system, "one", "trainers/image_vae")
    buffer = tree(system, "one", "data/image_vae")
    assert trainer["intake"]["body"]["frontier"] == loop["steps"] == buffer["seen"], "the buffer ends at the marker"
    assert len(buffer["frames"]) + buffer["fresh_count"] == loop["steps"]
    run = poll_for(lambda: system.status()["tracker"]["mlflow_run"], 60)
    system.kill_everything()

    begin_s = time.monotonic()
    system.start("up")
    system.wait_running()
    body, image_vae = system.service("body"), system.service("image_vae")
    assert loop["steps"] <= body["steps"] < loop["steps"] + 10 * (time.monotonic() - begin_s) + 20
    assert image_vae["steps"] >= trainer["training"]["updates"]
    assert image_vae["buffer"]["seen"] >= buffer["seen"]
    told = poll_for(lambda: (told := system.status()["tracker"])["written"] and told, 60, "MLflow is written to")
    assert told["mlflow_run"] == run
    assert lost(system) == 0


def lived(system: System, steps: int, *more: str) -> list[RecordBatch]:
    """Start a system and let it live until the body has taken so many steps; return its records."""
    batches: list[RecordBatch] = []

    def so_far() -> bool:
        batches.extend(collect(0.5))
        return bool(batches) and batches[-1].end >= steps

    with system.listening() as collect:
        for name in ("controller", "image_vae", "forward_dynamics", "ppo", "body"):
            system.start(name, *more, *((f"trainer={name}",) if name not in ("controller", "body") else ()))
        poll_for(so_far, 600.0, f"{steps} steps")
    return batches


def column(batches: list[RecordBatch], name: str, first: int, end: int) -> np.ndarray[Any, Any]:
    """Return a column of the records first … end − 1, each once."""
    rows: dict[int, Any] = {}
    for batch in batches:
        rows |= {batch.first_sequence + n: batch.data[name][n] for n in range(len(batch))}
    return np.stack([rows[n] for n in range(first, end)])


@pytest.mark.slow
def test_a_restored_life_is_the_same_to_the_last_bit(make_system: MakeSystem) -> None:
    straight = make_system(*CURIOUS)
    reference = lived(straight, 2_000)
    straight.close()

    broken_off = make_system(*CURIOUS)
    lived(broken_off, 1_000)
    save(broken_off, "half")
    at = tree(broken_off, "half", "interaction/body/loop")["steps"]
    assert is_window_end(at, 50)
    broken_off.kill_everything()
    half = f"checkpoint={broken_off.run_dir}/checkpoints/half"
    again = lived(broken_off, 2_000, half, "checkpoint.seamless=true")
    for name in ("observation", "embedding", "hidden", "action", "log_prob", "value", "reward", "rewarded"):
        expected, got = (column(batches, name, at, 2_000) for batches in (reference, again))
        np.testing.assert_array_equal(got, expected, err_msg=f"{name} after step {at}")


@pytest.mark.slow
def test_a_pause_survives_a_save_and_a_save_works_while_paused(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    system.command("pause")
    steps = system.service("body")["steps"]
    save(system, "paused")
    assert system.status()["system"] == "paused"
    assert tree(system, "paused", "interaction/body/loop")["steps"] == steps
    system.kill_everything()
    system.start("up")
    poll_for(lambda: system.service("image_vae")["state"] == "paused", 30, "paused again")
    assert system.service("body")["steps"] == steps
    system.command("resume")
    poll_for(lambda: system.service("body")["steps"] > steps + 5, what="it goes on")


@pytest.mark.slow
def test_a_trainer_that_dies_during_a_save_fails_that_one_only_and_is_named(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    system.start("controller")
    system.start("body")
    trainer = system.start("image_vae")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    trainer.signal(signal.SIGSTOP)
    begun = system.ami("save", "--name", "first")
    assert begun.returncode == 0, begun.stderr
    trainer.kill()
    poll_for(lambda: system.status()["hub"]["checkpoint"]["trouble"], what="the save fails")
    assert "image_vae" in system.status()["hub"]["checkpoint"]["trouble"]
    system.start("image_vae")
    system.wait_for_state("image_vae", "running")
    save(system, "second")
    assert folder(system).all_names() == ["second"]
    assert system.service("body")["skipped_ticks"] == 0


@pytest.mark.slow
def test_wherever_a_save_is_broken_off_latest_is_what_was_reported(make_system: MakeSystem) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    print(f"seed {seed}")
    system = make_system(*NOISE)
    running = {name: system.start(name) for name in ("controller", "body", "image_vae")}
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    reported = []
    for turn in range(15):
        victim = chance.choice(list(running)) if turn % 5 < 4 else None
        saving = system.begin_ami("save", "--wait", "--name", f"save-{turn:02}")
        if victim:
            time.sleep(chance.uniform(0.1, 0.6))
            running[victim].kill()
            if victim != "controller":
                saving.wait(30.0)
            running[victim] = system.start(victim)
        if saving.wait(30.0) == 0:
            reported.append(f"save-{turn:02}")
        system.wait_running()
        newest = folder(system).newest_whole()
        assert newest is not None or not reported
        assert not reported or (newest and newest.name >= reported[-1]), f"seed {seed}, turn {turn}, {victim} killed"
        if victim == "controller":
            assert not list((system.run_dir / "checkpoints").glob(".*.saving")), "litter"
    assert reported, f"seed {seed}: every save failed"
    assert folder(system).all_names() == folder(system).names()


@pytest.mark.slow
def test_a_trainer_that_returns_alone_has_its_buffer_again_and_catches_up(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    system.start("controller")
    system.start("body")
    trainer = system.start("image_vae")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    save(system, "one")
    time.sleep(2.0)
    trainer.kill()
    system.start("image_vae")
    system.wait_for_state("image_vae", "running")
    poll_for(lambda: behind(system) < 25, what="all records")
    assert lost(system) == 0
    assert system.service("image_vae")["steps"] >= tree(system, "one", "trainers/image_vae")["training"]["updates"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["removed", "one bit"])
def test_a_checkpoint_spoilt_under_the_living_gives_way_to_the_one_before(make_system: MakeSystem, damage: str) -> None:
    system = make_system(*NOISE)
    controller = system.start("controller")
    system.start("body")
    trainer = system.start("image_vae")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    save(system, "old")
    save(system, "new")
    if damage == "removed":
        folder(system).remove("new")
    else:
        path = folder(system).directory / "new" / "trainers" / "image_vae.json"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    trainer.kill()
    second = system.start("image_vae")
    poll_for(lambda: "image_vae continues from checkpoint old" in second.output, 30)
    system.wait_for_state("image_vae", "running")
    assert "checkpoint new cannot be restored" in controller.output
    save(system, "newer")


def test_an_orderly_end_saves_first(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    up = system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    poll_for(lambda: "running · " in up.output, 60, "a summary: no other system is saved")
    up.signal(signal.SIGINT)
    assert up.exit_code() == 0, up.output
    (name,) = folder(system).names()
    folder(system).verify(name)
    assert tree(system, name, "trainers/image_vae")["training"]["updates"] > 20


@pytest.mark.slow
def test_a_broken_checkpoint_is_passed_over_by_latest_and_refused_by_name(make_system: MakeSystem) -> None:
    system = make_system(*NOISE, "checkpoint.at_shutdown=false")
    up = system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    save(system, "old")
    save(system, "new")
    assert system.ami("shutdown").returncode == 0
    assert up.exit_code() == 0
    path = system.run_dir / "checkpoints" / "new" / "models" / "image_encoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)

    refused = system.start("up", f"checkpoint={system.run_dir}/checkpoints/new")
    assert refused.exit_code() == 2
    assert str(path) in refused.output
    assert "Traceback" not in refused.output

    second = system.start("up")
    system.wait_running()
    assert "a damaged checkpoint is skipped" in second.output
    assert "continuing from checkpoint old" in second.output


def test_another_architecture_is_listed_before_the_start_and_may_begin_anew(make_system: MakeSystem) -> None:
    system = make_system(*NOISE, "checkpoint.at_shutdown=false")
    up = system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    save(system, "one")
    assert system.ami("shutdown").returncode == 0
    assert up.exit_code() == 0

    other = system.start("controller", "models=small")
    assert other.exit_code() == 2
    line = one_error_line(other.output)
    assert "checkpoint one does not fit this configuration" in line
    assert "models.image_encoder" in line
    assert "checkpoint.allow=partial" in line

    second = system.start("up", "models=small", "checkpoint.allow=partial")
    system.wait_running()
    assert "checkpoint one does not fit: models.image_encoder" in second.output
    assert system.service("body")["steps"] >= tree(system, "one", "interaction/body/loop")["steps"]
    assert system.service("image_vae")["buffer"]["seen"] >= tree(system, "one", "data/image_vae")["seen"]


def test_two_controllers_do_not_share_a_directory(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    first = system.start("controller")
    system.wait_for_controller()
    other = make_system(*NOISE)
    second = other.start("controller", f"run_dir={system.run_dir}")
    assert second.exit_code() == 2
    assert f"is used by another controller (process {first.pid})" in one_error_line(second.output)


@pytest.mark.slow
def test_a_directory_that_vanishes_fails_the_save_and_harms_nobody(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    directory = system.run_dir / "checkpoints"
    (directory / ".lock").unlink()
    directory.rmdir()
    directory.write_text("a file in its place")
    failed = system.ami("save", "--wait")
    assert failed.returncode == 1
    assert str(directory) in one_error_line(failed.stderr)
    assert system.status()["system"] == "running"
    directory.unlink()
    save(system, "again")


@pytest.mark.slow
def test_a_run_can_be_taken_back_to_a_checkpoint_and_goes_on_from_there(make_system: MakeSystem) -> None:
    system = make_system(*NOISE, "checkpoint.at_shutdown=false")
    up = system.start("up")
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    save(system, "one")
    version = system.model()["version"]
    poll_for(lambda: system.model()["version"] > version + 3, what="more is learned")
    save(system, "two")
    newest = system.model()["version"]
    assert system.ami("shutdown").returncode == 0
    assert up.exit_code() == 0

    second = system.start("up", f"checkpoint={system.run_dir}/checkpoints/one")
    system.wait_running()
    assert "restored from checkpoint one, as version" in second.output
    assert system.model()["version"] > newest, "versions never go back"
    with system.listening() as collect:
        assert min(int(batch.versions["image_encoder"].min()) for batch in poll_for(lambda: collect(1.0))) > newest
    state = json.loads((system.run_dir / "state.json").read_text())
    assert state["restored_from"] == "one"
    system.kill_everything()  # before anything was saved
    assert folder(system).names() == ["one", "two"]

    for wish in ([f"checkpoint={system.run_dir}/checkpoints/one"], []):
        third = system.start("up", *wish)
        system.wait_running()
        assert "continuing from checkpoint one" in third.output
        assert system.model()["version"] > newest
        system.kill_everything()


def test_a_controller_that_a_signal_ends_saves_first_and_the_others_live_on(make_system: MakeSystem) -> None:
    system = make_system(*NOISE)
    controller = system.start("controller")
    others = [system.start(name) for name in ("body", "image_vae")]
    system.wait_running()
    controller.signal(signal.SIGTERM)
    assert controller.exit_code() == 0, controller.output
    (name,) = folder(system).names()
    folder(system).verify(name)
    assert all(process.popen.poll() is None for process in others)
    system.start("controller")
    system.wait_running()
    assert [system.service(process.name)["pid"] for process in others] == [process.pid for process in others]


def test_who_lived_through_what_a_run_is_taken_back_from_begins_anew(make_system: MakeSystem) -> None:
    system = make_system(*NOISE, "checkpoint.at_shutdown=false")
    controller = system.start("controller")
    living = [system.start(name) for name in ("body", "image_vae")]
    system.wait_running()
    poll_for(lambda: system.service("image_vae")["steps"] > 20, 60, "gradient steps")
    save(system, "one")
    saved = tree(system, "one", "trainers/image_vae")["training"]["updates"]
    poll_for(lambda: system.service("image_vae")["steps"] > 3 * saved, 60, "more is learned")
    newest = system.model()["version"]
    controller.kill()
    system.start("controller", "checkpoint=one")
    for process in living:
        assert process.exit_code() == 1, "an exit after which it is started again"
        assert "the run was taken back" in one_error_line(process.output)
    system.start("image_vae")
    system.wait_for_state("image_vae", "running", 40.0)
    assert saved <= system.service("image_vae")["steps"] < 3 * saved, "it learns from there"
    system.start("body")
    system.wait_running()
    poll_for(lambda: system.model()["used"].get("body", 0) > newest, what="versions never go back")
