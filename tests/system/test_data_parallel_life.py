"""A trainer that torchrun started as two processes, in a living system."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import psutil
import pytest
from processes import Process, System, poll_for

MODULE = "ami_trainer.main"


def start_two_ranks(system: System) -> Process:
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", MODULE, *system.overrides]
    process = Process("image_vae", command, system.folder / "ranks.log", cwd=system.folder)
    system.processes.append(process)
    return process


def ranks(torchrun: Process) -> dict[int, psutil.Process]:
    return {int(child.environ()["RANK"]): child for child in psutil.Process(torchrun.pid).children()}


def version_after(system: System, version: int) -> int:
    return poll_for(lambda: (now := system.model()["version"]) > version and now, 60.0, f"a version after {version}")


@pytest.mark.slow
def test_two_processes_train_pause_come_back_and_end_as_one_service(make_system: Callable[..., System]) -> None:
    system = make_system("experiment=noise")
    system.start("controller")
    system.start("body")
    torchrun = start_two_ranks(system)
    poll_for(lambda: system.service("image_vae")["state"] == "running", 90.0, "the trainer runs")
    version = version_after(system, 1)

    system.command("pause")
    still = system.model()["version"]
    worked = [rank.cpu_times() for rank in ranks(torchrun).values()]
    with pytest.raises(AssertionError, match="not within"):
        poll_for(lambda: system.model()["version"] > still, 4.0)
    busy = [rank.cpu_times().user - before.user for rank, before in zip(ranks(torchrun).values(), worked, strict=True)]
    assert max(busy) < 0.5, "who waits burns no core"
    system.command("resume")
    version_after(system, max(version, still))

    ranks(torchrun)[1].kill()
    poll_for(lambda: "another process of this trainer is gone" in torchrun.output, what="rank 0 says what happened")
    assert len(re.findall(r"\bERROR\b", torchrun.output)) == 1
    assert "Traceback" not in torchrun.output
    version_after(system, system.model()["version"])  # torchrun started both anew, and they went on

    assert system.ami("shutdown").returncode == 0
    assert torchrun.exit_code() == 0
    poll_for(lambda: not system.leftovers(), what="no process is left")
    assert "Traceback" not in torchrun.output


@pytest.mark.slow
def test_without_rank_0_the_others_end(make_system: Callable[..., System]) -> None:
    system = make_system("experiment=noise")
    torchrun = start_two_ranks(system)
    poll_for(lambda: "takes its share" in torchrun.output, 90.0, "both have found each other")
    first, second = (ranks(torchrun)[n] for n in range(2))
    first.kill()
    assert second.wait(8.0) in (1, None)
    assert "rank 0 of this trainer is gone" in torchrun.output
    assert "Traceback" not in torchrun.output
