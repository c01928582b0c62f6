from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from learning import tiny_trainer

from ami_shared.errors import ConfigurationError
from ami_trainer.data_parallel import Order, form_team, processes_here, share_with

FOLDER = Path(__file__).parent


def free_port() -> int:
    """Return a port that is free, below those that the system hands out, and no other worker's."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    for turn in range(100):
        port = 13_000 + 100 * worker + (os.getpid() + turn) % 100
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@contextmanager
def ranks_of(arguments: list[str], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start two processes as torchrun does, each with its stderr in a file of the folder; kill what is left of them."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(2):
        with (folder / f"stderr-{rank}").open("w") as told:
            of_rank = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([sys.executable, *arguments], env=of_rank, stderr=told))
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with what became of everything that was trained alone, and by two processes."""
    folder = tmp_path_factory.mktemp("sharing")
    deadline = time.monotonic() + 600
    with ranks_of([str(FOLDER / "sharing.py"), str(folder)], folder) as ranks:
        while None in (codes := [process.poll() for process in ranks]) and not any(codes):
            assert time.monotonic() < deadline, "they never came to an end"
            time.sleep(0.05)  # one that dies leaves the other waiting for it
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(
        (folder / f"stderr-{rank}").read_text() for rank in range(2)
    )
    return folder


def outcome(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as numbers:
        return dict(numbers)


FAILING = """
import torch
from ami_shared.command import exit_code, leave
from ami_trainer.data_parallel import Order, form_team

def main():
    team = form_team("cpu")
    team.carry_out = lambda order: team.sum_up(torch.ones(8))
    if team.rank:
        team.work()
    with team:
        team.order(Order())
        raise ZeroDivisionError("in the middle of a step")

leave(exit_code("trainer", main))
"""


def test_when_rank_0_fails_in_the_middle_of_a_step_all_end(tmp_path: Path) -> None:
    with ranks_of(["-c", FAILING], tmp_path) as ranks:
        codes = [process.wait(timeout=120) for process in ranks]
    assert codes == [1, 1]
    assert "ZeroDivisionError: in the middle of a step" in (tmp_path / "stderr-0").read_text()
    assert "rank 0 of this trainer is gone" in (tmp_path / "stderr-1").read_text()


@pytest.mark.parametrize("name", ["Policy", "Encoder", "Dynamics", "Inverse"])
def test_two_processes_learn_what_one_would_learn(outcomes: Path, name: str) -> None:
    shared, alone = outcome(outcomes, f"{name}-shared"), outcome(outcomes, f"{name}-alone")
    assert shared.keys() == alone.keys()
    assert sum(key.startswith("loss") for key in shared) > 5
    for key in shared:
        np.testing.assert_allclose(shared[key], alone[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_what_is_not_finite_at_one_rank_is_skipped_by_all(outcomes: Path) -> None:
    for told in (outcome(outcomes, "Poison-shared"), outcome(outcomes, "Poison-alone")):
        assert told["skipped"].tolist() == [0, 0, 1, 0, 0, 1]
        assert [bool(told[f"changed {n}"]) for n in range(6)] == [True, True, False, True, True, False]
        assert told["finite"]


def test_without_torchrun_there_is_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert form_team("cuda:7") is None
    assert processes_here() == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert form_team("cuda:7") is None


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_that_only_one_process_can_have_is_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="must be cpu or cuda"):
        form_team(device)


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "65")
    monkeypatch.setenv("LOCAL_RANK", "64")
    with pytest.raises(ConfigurationError, match="no GPU for process 64 of this machine"):
        form_team("cuda")


def test_a_trainer_that_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"trainers\.mine: object has no share\(\)"):
        share_with(None, object(), "trainers.mine")  # type: ignore[arg-type]


def test_too_few_frames_for_all_processes_are_refused() -> None:
    team: Any = SimpleNamespace(size=3)
    with pytest.raises(ConfigurationError, match="batch_size=5 is too small for 3 processes"):
        tiny_trainer(batch_size=5).share(team)
    tiny_trainer(batch_size=6).share(team)


def test_an_order_arrives_as_it_was_given() -> None:
    order = Order(refill=True, seed=2**59, forms=[["uint8", [32, 3, 84, 84]], ["float32", []]])  # type: ignore[list-item]
    assert Order.from_bytes(order.to_bytes()) == order
