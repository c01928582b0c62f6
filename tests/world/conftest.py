"""A real world process on free ports, steered by real OSC and read over real HTTP."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pythonosc.udp_client import SimpleUDPClient

CONFIGS = Path(__file__).parents[2] / "configs"
PROGRAM = "from ami_world import main; main.main()"


class RunningWorld:
    def __init__(self, folder: Path, *overrides: str, supervised: bool = False, program: str = PROGRAM) -> None:
        self.folder = folder
        self.http_port = free_port(socket.SOCK_STREAM)
        self.osc_port = free_port(socket.SOCK_DGRAM)
        (folder / "cwd").mkdir(parents=True)
        (folder / "tmp").mkdir()
        ports = [f"world.http_port={self.http_port}", f"world.osc_port={self.osc_port}"]
        environment = {"AMI_CONFIG_DIR": str(CONFIGS), "TMPDIR": str(folder / "tmp")}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "experiment=simulated", *ports, *overrides],
                cwd=folder / "cwd",
                env={**os.environ, **environment, "AMI_SUPERVISED": str(int(supervised))},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text().splitlines()

    def wait_until_ready(self) -> RunningWorld:
        self.wait_until(lambda: any("is ready" in line for line in self.log), timeout_s=60)
        return self

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
        """Poll until the condition holds and return its value; show the log if it never does."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if result := condition():
                return result
            time.sleep(0.02)
        if result := condition():  # this process may have slept past the end
            return result
        raise AssertionError("this never came to be; the log: " + "\n".join(self.log))

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.get("/state"))
        return state

    def send(self, address: str, value: object) -> None:
        client = SimpleUDPClient("127.0.0.1", self.osc_port)
        try:
            client.send_message(address, value)
        finally:
            client._sock.close()

    def send_bytes(self, datagram: bytes) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(datagram, ("127.0.0.1", self.osc_port))

    def settle(self) -> None:
        """Let go of everything and wait until the avatar stands still."""
        for address in ("/input/Vertical", "/input/Horizontal", "/input/LookHorizontal", "/input/Run"):
            self.send(address, 0)
        self.wait_until(lambda: not any(self.state()["inputs"].values()))
        last = self.state()

        def still() -> bool:
            nonlocal last
            state = self.state()
            if state["tics"] < last["tics"] + 3:
                return False
            before, last = last, state
            return state["position"] == before["position"]

        self.wait_until(still)

    def engines(self) -> list[int]:
        """Process ids of the game engines that were started for this world."""
        mark = str(self.folder / "tmp").encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def exit_code(self) -> int:
        return self.process.wait(60)

    def signal_and_wait(self, number: int) -> int:
        self.process.send_signal(number)
        return self.exit_code()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        if self.process.stdin:
            self.process.stdin.close()


PORTS = 150  # each test worker takes its own, below those that other tests and the kernel hand out
_TURNS = itertools.count(os.getpid())


def free_port(kind: int) -> int:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    for _ in range(PORTS):
        port = 12_000 + PORTS * worker + next(_TURNS) % PORTS
        with socket.socket(socket.AF_INET, kind) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@pytest.fixture
def start_world(tmp_path: Path) -> Iterator[Callable[..., RunningWorld]]:
    """Return a function that starts a world of one's own; it is ended after the test."""
    worlds: list[RunningWorld] = []

    def start(*overrides: str, **options: Any) -> RunningWorld:
        folder = tmp_path / f"world-{len(worlds)}"
        worlds.append(RunningWorld(folder, *overrides, **options))
        return worlds[-1]

    yield start
    for world in worlds:
        world.close()


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorld]:
    world = RunningWorld(tmp_path_factory.mktemp("world") / "shared", "seed=2")
    try:
        yield world.wait_until_ready()
    finally:
        world.close()


@pytest.fixture
def world(shared_world: RunningWorld) -> RunningWorld:
    """Return the module's world with the avatar at rest."""
    shared_world.settle()
    return shared_world
