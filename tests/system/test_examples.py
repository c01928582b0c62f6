"""The examples of docs/extending.md, cut out of the page and run together as real processes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import System, free_base_port, poll_for
from pythonosc.osc_message import OscMessage

from ami_inference.actuators.vrchat_osc import datagram

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MakeSystem = Callable[..., System]


@pytest.fixture(autouse=True)
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let modules and experiments of the page be found by processes that are started from now on."""
    modules, configs = tmp_path / "modules", tmp_path / "configs"
    modules.mkdir()
    shutil.copytree(ROOT / "configs", configs)
    blocks = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())
    for kind, name, text in blocks:
        (configs / "experiment" / name if kind == "yaml" else modules / name).write_text(text)
    assert {kind for kind, _, _ in blocks} == {"python", "yaml"}
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    monkeypatch.setenv("AMI_CONFIG_DIR", str(configs))


class Avatar:
    """Something that talks as VRChat does: tells of the avatar's parameters, and hears of its inputs."""

    def __init__(self, sensor_port: int, actuator_port: int) -> None:
        self._out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sensor = ("127.0.0.1", sensor_port)
        self._in = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._in.bind(("127.0.0.1", actuator_port))
        self._in.settimeout(0.05)
        self._ending = threading.Event()
        self.telling = threading.Event()
        self.inputs: dict[str, set[float]] = {}
        self.held: dict[str, float] = {}
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def _live(self) -> None:
        step = 0
        while not self._ending.is_set():
            if self.telling.is_set():
                step += 1
                for name, value in (("VelocityZ", step % 7 / 7), ("Grounded", step % 2), ("Mood", 5)):
                    self._out.sendto(datagram(f"/avatar/parameters/{name}", value), self._sensor)
                self._out.sendto(b"/avatar/parameters/Grounded\0,\0\0\0", self._sensor)  # without a value
                self._out.sendto(b"\xff\0\0\0,\0\0\0", self._sensor)
            try:
                message = OscMessage(self._in.recv(4096))
            except TimeoutError:
                continue
            self.held[message.address] = message.params[0]
            self.inputs.setdefault(message.address, set()).add(message.params[0])

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self._in.close()
        self._out.close()


@pytest.fixture
def ports() -> tuple[int, int]:
    base = free_base_port(2)
    return base, base + 1


@pytest.fixture
def avatar(ports: tuple[int, int]) -> Iterator[Avatar]:
    made = Avatar(*ports)
    yield made
    made.close()


def test_the_examples_form_a_system_that_learns(make_system: MakeSystem) -> None:
    system = make_system("experiment=corridor", models="vector")
    system.start("up")
    system.wait_running()
    poll_for(lambda: system.model("policy_value")["used"].get("body", 0) >= 3, 30.0, "a policy that was learned")
    poll_for(lambda: system.model("whereabouts")["version"] >= 2, 30.0, "whereabouts that were learned")
    status = system.status()
    assert status["experience"][0]["lost"] == {"ppo": 0, "whereabouts": 0}
    assert system.service("whereabouts")["losses"]["loss"] < 1.0
    assert system.ami("shutdown").returncode == 0


def test_a_sensor_and_an_actuator_of_ones_own_are_lived_with(
    make_system: MakeSystem, ports: tuple[int, int], avatar: Avatar
) -> None:
    inference = "inference.environment"
    system = make_system(
        "experiment=feeling",
        f"{inference}.sensor.port={ports[0]}",
        f"{inference}.actuator.port={ports[1]}",
        models="vector",
    )
    system.start("up")
    system.wait_for_state("body", "blind", 60.0)
    assert "is OSC enabled" in system.service("body")["trouble"]
    avatar.telling.set()
    system.wait_running()
    poll_for(lambda: system.model("policy_value")["used"].get("body", 0) >= 2, 60.0, "a policy that was learned")
    assert avatar.inputs == {"/input/Vertical": {0.0, 1.0, -1.0}, "/input/GrabRight": {0, 1}}
    system.command("pause")
    poll_for(lambda: not any(avatar.held.values()), what="everything let go of")
    assert system.ami("shutdown").returncode == 0
