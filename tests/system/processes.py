"""Real processes for the system tests: starts services on ports of their own, watches them, and ends them all."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import zmq

from ami_controller.cli.client import Client
from ami_controller.key_folder import KeyFolder
from ami_shared import wire
from ami_shared.bus import EXPERIENCE, PARAMETERS, HubAddress, Port, SocketOptions, dial
from ami_shared.config import load_config
from ami_shared.errors import AmiError, NoControllerError
from ami_shared.keys import KeyFile
from ami_shared.records import TOPIC, RecordBatch
from ami_shared.snapshots import Snapshot, topic

T = TypeVar("T")
PATIENCE_S = 90.0  # a busy machine may hold up any process for long, its imports above all
MODULES = {
    "controller": "ami_controller.main",
    "world": "ami_world.main",
    "body": "ami_inference.main",
    "image_vae": "ami_trainer.main",
    "forward_dynamics": "ami_trainer.main",
    "ppo": "ami_trainer.main",
    "up": "ami_controller.cli.main",
}
KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
MARK = "AMI_TEST_FOLDER"  # in the environment of a system's processes, and of all that these start
SEEING_ONLY = ["inference/agent=random_holding", "~trainers@trainers.forward_dynamics", "~trainers@trainers.ppo"]


def poll_for(condition: Callable[[], T], timeout_s: float = PATIENCE_S, what: str = "") -> T:
    """Return the condition's first true value; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    if value := condition():  # this process may have slept past the deadline
        return value
    raise AssertionError(f"not within {timeout_s:g} s: {what or condition}")


def unchanged(read: Callable[[], T], for_s: float = 1.0) -> T:
    """Return what is read, as soon as it is the same at both ends of so long a time."""

    def same() -> list[T]:
        before = read()
        time.sleep(for_s)
        return [before] if read() == before else []

    return poll_for(same, what="it stands still")[0]


def free_base_port(count: int = 8, beside: range = range(0)) -> int:
    """Return a port that is free, and so are the next ones, for TCP and UDP.

    Each test worker looks in a range of its own, below those that the kernel hands out.

    Args:
        beside: ports that are spoken for, though nobody may listen there yet.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    begin, bases = 21_000 + worker * 700, 700 // count
    for n in range(bases):
        base = begin + (os.getpid() + n) % bases * count
        ports = range(base, base + count)
        if not set(ports) & set(beside) and all(_free(port, kind) for port in ports for kind in KINDS):
            return base
    raise AssertionError("no free ports")


def _free(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Process:
    """One started command, and what it printed."""

    def __init__(self, name: str, command: list[str], log: Path, **options: Any) -> None:
        self.name, self.log = name, log
        self._file = log.open("ab")
        self.popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.STDOUT, **options
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.popen.kill()
        self.popen.wait()

    def exit_code(self, timeout_s: float = 60.0) -> int:
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout_s:g} s:\n{self.output}") from None

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(3.0)
            except subprocess.TimeoutExpired:
                self.kill()
        self._file.close()


def service_in(status: dict[str, Any], name: str) -> dict[str, Any]:
    services = {service["name"]: service for service in status.get("services", ())}
    return services.get(name, {"state": "absent"})


class System:
    """The services of one test."""

    def __init__(self, folder: Path, *overrides: str, models: str = "tiny", curious: bool = False) -> None:
        """Args:
        models: their size, or another choice of models.
        curious: all trainers of the simulated experiment; otherwise the encoder's alone, which starts sooner.
        """
        base = free_base_port()
        self.folder, self.run_dir = folder, folder / "run"
        self.hub = HubAddress("127.0.0.1", base)
        self.http_port, self.osc_port = base + 5, base + 6
        self.overrides = [f"hub={self.hub}", f"run_dir={self.run_dir}", f"models={models}", *overrides]
        if not any(word.startswith("experiment=") and "simulated" not in word for word in overrides):
            self.overrides += [f"world.http_port={self.http_port}", f"world.osc_port={self.osc_port}"]
            self.overrides += [] if curious else SEEING_ONLY
        if not any(".priority=" in word for word in overrides):  # idle trainers get next to nothing of a busy machine
            trainers = load_config(self.overrides).trainers
            self.overrides += [f"++trainers.{name}.service.priority=normal" for name in trainers]
        self.processes: list[Process] = []
        self._keys: dict[str, Path] = {}

    def use_keys(self, **roles: str) -> None:
        """Make the hub's keys and a key file for each service, all to be used from now on; `me` is the operator."""
        folder = KeyFolder(self.folder / "keys")
        folder.init(self.hub)
        for name, role in {"body": "body", "image_vae": "trainer", "me": "operator", **roles}.items():
            self._keys[name] = self.folder / f"{name}.key.json"
            folder.add(name, role, self._keys[name])
        self._keys["controller"] = folder.folder
        self.hub = self.hub.with_credentials(KeyFile.load(self._keys["me"]).credentials)

    def _key_of(self, name: str) -> list[str]:
        if name not in self._keys:
            return []
        return (
            [f"controller.key_folder={self._keys[name]}"] if name == "controller" else ["--join", str(self._keys[name])]
        )

    def start(self, name: str, *more: str) -> Process:
        """Start one service (or `up`) with this system's configuration."""
        words = ["up"] if name == "up" else []
        command = [sys.executable, "-m", MODULES[name], *words, *self.overrides, *self._key_of(name), *more]
        log = self.folder / f"{name}-{len(self.processes)}.log"
        process = Process(name, command, log, env={**os.environ, MARK: str(self.folder)}, cwd=self.folder)
        self.processes.append(process)
        return process

    def ami(self, *words: str, timeout_s: float = 150.0) -> subprocess.CompletedProcess[str]:
        """Run the command line against this system."""
        return subprocess.run(self._ami(words), capture_output=True, text=True, timeout=timeout_s, check=False)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Give a command that may be repeated until it is done: somebody may be silent for too long at first."""

        def done() -> subprocess.CompletedProcess[str] | None:
            given = self.ami(*words)
            told.append(given.stdout + given.stderr)
            return given if given.returncode == 0 else None

        told: list[str] = []
        try:
            return poll_for(done, 60.0, f"{words[0]} is done")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{told[-1]}") from None

    def begin_ami(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a command of the command line against this system."""
        return subprocess.Popen(self._ami(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _ami(self, words: Sequence[str]) -> list[str]:
        command = [sys.executable, "-m", "ami_controller.cli.main", *words, "--hub", str(self.hub)]
        return command if "--join" in words else [*command, *self._key_of("me")]

    def _ask(self) -> dict[str, Any]:
        with Client(self.hub) as client:
            return client.status()

    def _told_at_once(self) -> dict[str, Any]:
        """What the controller tells; nothing where none answers yet."""
        try:
            return self._ask()
        except AmiError:
            return {}

    def status(self) -> dict[str, Any]:
        """What the controller tells, which may be held up."""

        def told() -> dict[str, Any]:
            try:
                return self._ask()
            except NoControllerError:
                return {}

        return poll_for(told, what="the controller answers")

    def service(self, name: str) -> dict[str, Any]:
        return service_in(self.status(), name)

    def model(self, name: str = "image_encoder") -> dict[str, Any]:
        """What the status tells of a model; nothing before it is known."""
        models = {model["name"]: model for model in self.status()["models"]}
        return models.get(name, {"version": 0, "used": {}})

    def wait_running(self, timeout_s: float = 120.0) -> dict[str, Any]:
        """Return the status as soon as every service runs."""

        def running() -> dict[str, Any] | None:
            status = self._told_at_once()
            complete = all(service["state"] == "running" for service in status.get("services", ()))
            return status if status.get("system") == "running" and complete else None

        try:
            return poll_for(running, timeout_s, "all services running")
        except AssertionError as error:
            logs = "\n".join(f"--- {p.name}\n{p.output[-2000:]}" for p in self.processes)
            raise AssertionError(f"{error}\n{logs}") from None

    def wait_for_controller(self) -> None:
        poll_for(self._told_at_once, what="the controller answers")

    def wait_for_state(self, name: str, state: str, timeout_s: float = PATIENCE_S) -> None:
        poll_for(lambda: service_in(self._told_at_once(), name)["state"] == state, timeout_s, f"{name} {state}")

    def world(self) -> dict[str, Any]:
        """The simulated world's own account of itself."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/state", timeout=PATIENCE_S) as answer:
            state: dict[str, Any] = json.load(answer)
            return state

    def held_inputs(self) -> dict[str, float]:
        """The inputs that the world holds, without those at rest."""
        return {name: value for name, value in self.world()["inputs"].items() if value}

    @contextmanager
    def subscribed(self, port: Port, options: SocketOptions, prefix: bytes) -> Iterator[zmq.Socket[bytes]]:
        """Subscribe to the topics of a stream that begin so, for the block."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            yield dial(context, zmq.SUB, self.hub, port, replace(options, subscriptions=(prefix,)))
        finally:
            context.destroy(linger=0)

    @contextmanager
    def listening(self) -> Iterator[Callable[[float], list[RecordBatch]]]:
        """Subscribe to the experience stream; the block gets a function that collects for some seconds."""
        with self.subscribed(Port.EXPERIENCE_OUT, EXPERIENCE, TOPIC) as listener:

            def collect(seconds: float) -> list[RecordBatch]:
                batches, deadline = [], time.monotonic() + seconds
                while (left_s := deadline - time.monotonic()) > 0:
                    if listener.poll(int(left_s * 1000)):
                        batches.append(RecordBatch.from_message(wire.decode(listener.recv_multipart())))
                return batches

            yield collect

    @contextmanager
    def following(self, model: str = "image_encoder") -> Iterator[dict[int, Snapshot]]:
        """Subscribe to a model's snapshots; the block gets those that came so far, by version."""
        came: dict[int, Snapshot] = {}
        ending = threading.Event()
        with self.subscribed(Port.PARAMETERS_OUT, PARAMETERS, topic(model)) as stream:

            def follow() -> None:
                while not ending.is_set():
                    if stream.poll(50):
                        snapshot = Snapshot.from_message(wire.decode(stream.recv_multipart()))
                        came[snapshot.version] = snapshot

            thread = threading.Thread(target=follow)
            thread.start()
            try:
                yield came
            finally:
                ending.set()
                thread.join()

    def _mine(self) -> list[psutil.Process]:
        """All processes of this system that still run, however they came to be."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def leftovers(self) -> list[str]:
        """Names of processes of this system that still run."""
        return [str(process) for process in self._mine()]

    def kill_everything(self) -> None:
        """kill -9 of every process of this system, at once."""
        mine = self._mine()
        for process in mine:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(mine, timeout=5.0)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.close()
        self.kill_everything()


def one_error_line(output: str) -> str:
    """Return the only ERROR line of an output; fail where there is none, several, or a traceback."""
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if re.search(r"\bERROR\b|^\S+ +\S+ +error: ", line)]
    assert len(errors) == 1, output
    return errors[0]
