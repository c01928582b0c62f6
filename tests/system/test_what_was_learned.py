"""Nothing that was learned is forgotten, whatever dies; here without any checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from processes import System, poll_for

from ami_controller.parameter_files import ParameterFiles
from ami_shared.config import agreement, load_config
from ami_shared.snapshots import Snapshot

MODEL = "image_encoder"
WITHOUT_CHECKPOINTS = ("experiment=noise", "checkpoint.interval=null", "checkpoint.at_shutdown=false")


def kept(system: System) -> Snapshot:
    """Return the encoder's snapshot that is on the disk."""
    files = ParameterFiles(system.run_dir / "parameters", agreement(load_config(system.overrides)))
    (snapshot,) = (snapshot for snapshot in files.load() if snapshot.model == MODEL)
    return snapshot


def begin_again(system: System) -> Snapshot:
    """Start the services; return the first snapshot that the trainer publishes."""
    system.start("controller")
    system.wait_for_controller()
    with system.following(MODEL) as snapshots:
        time.sleep(0.5)  # until the subscription is at the hub
        system.start("image_vae")
        system.start("body")
        system.wait_running()
        return snapshots[poll_for(lambda: min(snapshots, default=None), what="a snapshot")]


def assert_same_parameters(one: Snapshot, other: Snapshot) -> None:
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


def test_a_system_that_was_killed_goes_on_with_what_it_had_learned(make_system: Callable[..., System]) -> None:
    system = make_system(*WITHOUT_CHECKPOINTS)
    new = begin_again(system)
    poll_for(lambda: system.model()["version"] >= 5, 30.0, "something learned")
    assert system.ami("shutdown").returncode == 0
    for process in system.processes:
        assert process.exit_code() == 0
    learned = kept(system)
    assert learned.version >= 5
    assert not np.array_equal(*(next(iter(snapshot.arrays.values())) for snapshot in (new, learned)))

    second = begin_again(system)
    assert second.version > learned.version
    assert_same_parameters(second, learned)
    with system.listening() as collect:
        assert min(int(batch.versions[MODEL].min()) for batch in poll_for(lambda: collect(1.0))) >= learned.version

    for process in system.processes:
        process.kill()
    learned = kept(system)
    third = begin_again(system)
    assert third.version > learned.version
    assert_same_parameters(third, learned)


def test_parameters_of_other_models_end_up_with_one_line(make_system: Callable[..., System]) -> None:
    system = make_system(*WITHOUT_CHECKPOINTS)
    first = system.start("up")
    system.wait_running()
    poll_for(lambda: system.model()["version"] >= 1, what="a snapshot")
    assert system.ami("shutdown").returncode == 0
    assert first.exit_code() == 0
    second = system.start("up", "models=small")
    assert second.exit_code() == 2
    assert "has the parameters of other models" in second.output
    assert "another run_dir" in second.output
    assert "Traceback" not in second.output
