"""A system on four hosts, with keys: the controller, body and world, three trainers, and an operator far away."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from network import OTHER_MACHINE, Network, needs
from processes import MODULES, poll_for

PORT = 5550
TRAINERS = ("image_vae", "forward_dynamics", "ppo")
HOSTS = ("hub", "vrchat", "gpu", "laptop")

pytestmark = [pytest.mark.slow, needs("unshare")]


class Machines:
    """Four machines; each has only the key files that were carried to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.network = Network(*HOSTS)
        for host in HOSTS:
            (folder / host).mkdir()
        self.ami("hub", "keys", "init", "--hub", f"{self.network.address['hub']}:{PORT}")
        names = {"body": ("body", "vrchat"), "me": ("operator", "laptop"), "eye": ("observer", "laptop")}
        names |= dict.fromkeys(TRAINERS, ("trainer", "gpu"))
        for name, (role, host) in names.items():
            self.ami("hub", "keys", "add", name, "--role", role, "--to", str(folder / host / f"{name}.key.json"))

    def ami(self, host: str, *words: str, code: int = 0) -> str:
        """Run `ami` on a host; fail where it ends with another exit code."""
        command = self.network.command(host, sys.executable, "-m", "ami_controller.cli.main", *words)
        done = subprocess.run(
            command, cwd=self._folder / host, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, f"{words}: {done.stdout} {done.stderr}"
        return done.stdout + done.stderr

    def operator(self, *words: str, code: int = 0) -> str:
        return self.ami("laptop", *words, "--join", "me.key.json", code=code)

    def start(self, host: str, name: str, *words: str) -> Any:
        command = (*OTHER_MACHINE, sys.executable, "-m", MODULES[name], "experiment=simulated", "models=tiny", *words)
        log = self._folder / f"{name}-{len(self.network.processes)}.log"
        return self.network.start(host, name, log, *command, cwd=self._folder / host)

    def begin(self) -> None:
        address = self.network.address["hub"]
        self.start(
            "hub", "controller", f"hub={address}:{PORT}", f"controller.bind={address}", "controller.key_folder=keys"
        )
        self.start("vrchat", "world")
        self.start("vrchat", "body", "--join", "body.key.json")
        for trainer in TRAINERS:
            self.start("gpu", trainer, "--join", f"{trainer}.key.json")

    def status(self) -> dict[str, Any]:
        return json.loads(self.operator("status", "--json"))  # type: ignore[no-any-return]

    def stream(self) -> dict[str, Any]:
        return self.status()["experience"][0]  # type: ignore[no-any-return]

    def running(self) -> dict[str, Any] | None:
        try:
            status = self.status()
        except AssertionError:
            return None
        living = all(service["state"] == "running" for service in status["services"])
        return status if status["system"] == "running" and living and len(status["services"]) == 4 else None


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    made.network.close()


def in_use(status: dict[str, Any]) -> dict[str, int]:
    return {model["name"]: model["used"].get("body", 0) for model in status["models"]}


def test_a_system_on_four_hosts_with_keys_survives_a_cut_of_half_a_minute(machines: Machines) -> None:
    machines.begin()
    status = poll_for(machines.running, 90.0, "all run")
    assert status["hub"]["security"] == "keys"

    assert "body" in machines.operator("pause")
    time.sleep(1.0)  # until the last batch is sent, and a heartbeat tells of it
    before = machines.stream()["published"]
    time.sleep(1.5)
    assert machines.stream()["published"] == before, "paused"
    assert "may not say" in machines.ami("laptop", "resume", "--join", "eye.key.json", code=1)
    machines.operator("resume")
    poll_for(lambda: machines.stream()["published"] > before + 20, what="going on")
    saved = machines.operator("save", "--name", "first", "--wait")
    assert "saved" in saved

    versions, published = in_use(machines.status()), machines.stream()["published"]
    machines.network.pull_cable("gpu")
    time.sleep(30.0)
    machines.network.plug_cable("gpu")
    told = poll_for(machines.running, 60.0, "the trainers are back")
    body = next(service for service in told["services"] if service["name"] == "body")
    assert told["experience"][0]["published"] > published + 250, "acting went on"
    assert body["skipped_ticks"] <= 5

    def caught_up() -> dict[str, Any] | None:
        stream = machines.stream()
        return stream if all(n < 30 for n in stream["behind"].values()) and len(stream["behind"]) == 3 else None

    stream = poll_for(caught_up, 60.0, "what was missed is fetched")
    assert stream["lost"] == stream["records_from_memory"] == dict.fromkeys(TRAINERS, 0)
    assert all(stream["missed"][trainer] > 200 for trainer in TRAINERS)
    newer = poll_for(lambda: (used := in_use(machines.status())) != versions and used, 30.0, "new parameters are used")
    assert all(newer[model] >= version for model, version in versions.items()), "nothing stale is applied"

    machines.operator("shutdown", "--timeout", "60")
    assert [process.exit_code() for process in machines.network.processes if process.name != "world"] == [0] * 5
    for process in machines.network.processes:
        process.close()
    machines.network.processes.clear()
    machines.begin()
    again = poll_for(machines.running, 90.0, "the same commands go on where they ended")
    assert all(used >= newer[model] for model, used in in_use(again).items())
    assert "continuing from checkpoint" in machines.network.processes[0].output
