"""Two hosts in network namespaces of their own: packets are lost, a link is gone for a while, no record is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from network import OTHER_MACHINE, Network, needs
from processes import MODULES, Process, poll_for

NEAR, FAR = "near", "far"
PORT = 5550

pytestmark = [pytest.mark.slow, needs("iptables", "unshare")]


class Hosts:
    """One host with controller and body, another with the trainer."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._network = folder, Network(NEAR, FAR)
        self._hub = f"{self._network.address[NEAR]}:{PORT}"
        self.processes = self._network.processes

    def start(self, host: str, name: str, *before: str) -> Process:
        overrides = ["experiment=noise", "models=tiny", "inference.interval=0.01", f"hub={self._hub}"]
        overrides += [f"controller.bind={self._network.address[NEAR]}", "controller.insecure=true"]
        overrides.append("trainers.image_vae.buffer.capacity=20000")  # whoever comes late wants the whole life
        command = [*before, sys.executable, "-m", MODULES[name], *overrides, f"run_dir={self._folder}/run"]
        log = self._folder / f"{name}-{len(self.processes)}.log"
        return self._network.start(host, name, log, *command, cwd=self._folder)

    def ami(self, *words: str) -> subprocess.CompletedProcess[str]:
        ami = (sys.executable, "-m", "ami_controller.cli.main", *words, "--hub", self._hub)
        return subprocess.run(self._network.command(NEAR, *ami), capture_output=True, text=True, check=False)

    def status(self) -> dict[str, Any] | None:
        told = self.ami("status", "--json")
        return json.loads(told.stdout) if told.returncode == 0 else None

    def service(self, name: str) -> dict[str, Any]:
        status = self.status()
        return next((s for s in status["services"] if s["name"] == name), {}) if status else {}

    def stream(self) -> dict[str, Any] | None:
        status = self.status()
        return status["experience"][0] if status and status["experience"] else None

    def received(self) -> int:
        stream = self.stream()
        return int(stream["received"].get("image_vae", 0)) if stream else 0

    def lose_packets(self, share: float) -> None:
        """Let the cable between them lose a share of all packets, both ways; 0 = none."""
        self._network.lose_packets(FAR, share)

    def close(self) -> None:
        self._network.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.close()


def begin(hosts: Hosts, *before: str) -> None:
    hosts.start(NEAR, "controller")
    hosts.start(FAR, "image_vae", *before)
    poll_for(lambda: hosts.service("image_vae").get("pid"), 60, "the trainer is there before the body is born")
    hosts.start(NEAR, "body", *before)
    poll_for(lambda: hosts.received() > 50, 60, "records flow between the hosts")


def all_arrived(hosts: Hosts) -> dict[str, Any]:
    """Pause, and return the stream's account when nothing is on its way any more."""
    poll_for(lambda: hosts.ami("pause").returncode == 0, 60, "paused")

    def arrived() -> dict[str, Any] | None:
        told = hosts.stream()
        return told if told and told["received"]["image_vae"] + told["lost"]["image_vae"] == told["published"] else None

    return poll_for(arrived, 60, "all arrived")


def test_a_cable_that_loses_packets_and_is_then_cut_for_half_a_minute(hosts: Hosts) -> None:
    begin(hosts, *OTHER_MACHINE)
    skipped = hosts.service("body")["skipped_ticks"]
    hosts.lose_packets(0.2)
    time.sleep(20.0)
    hosts.lose_packets(1.0)
    time.sleep(30.0)
    assert hosts.status()["system"] != "stopping", "the body's host is alone, and goes on"  # type: ignore[index]
    hosts.lose_packets(0.0)
    before = hosts.received()
    poll_for(lambda: hosts.received() > before + 300, 60, "records flow again")
    told = all_arrived(hosts)
    assert told["lost"]["image_vae"] == 0
    assert told["missed"]["image_vae"] > 0
    assert hosts.service("body")["skipped_ticks"] < skipped + 150, "acting did not wait"


def test_where_memory_is_out_of_reach_both_streams_come_over_the_wire(hosts: Hosts) -> None:
    begin(hosts, *OTHER_MACHINE)
    poll_for(lambda: (hosts.service("body").get("snapshots_received") or 0) > 3, 40, "snapshots arrive")
    body = hosts.service("body")
    assert body["snapshots_from_memory"] == hosts.stream()["records_from_memory"]["image_vae"] == 0  # type: ignore[index]
    assert body["wire_errors"] == 0


def test_memory_of_the_same_host_is_seen_and_a_killed_trainer_leaves_none_behind(hosts: Hosts) -> None:
    begin(hosts)

    def from_memory() -> int:
        return int(hosts.service("body").get("snapshots_from_memory") or 0)

    poll_for(lambda: from_memory() > 3, 40, "snapshots are seen in memory")
    assert hosts.stream()["records_from_memory"]["image_vae"] > 0  # type: ignore[index]
    trainer = hosts.processes[1]
    trainer.kill()
    time.sleep(3.0)
    before = from_memory()
    hosts.start(FAR, "image_vae")
    poll_for(lambda: from_memory() > before + 2, 60, "those of its successor, too")
    folder = f"/proc/{hosts.processes[2].pid}/fd"
    held = [os.readlink(f"{folder}/{descriptor}") for descriptor in os.listdir(folder)]
    assert sum(link.startswith("/memfd:ami") for link in held) <= 40
    assert all_arrived(hosts)["lost"]["image_vae"] == 0
