"""Two hosts in network namespaces of their own: packets are lost, a link is gone for a while, no record is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import MODULES, Process, poll_for

HUB_HOST, TRAINER_HOST = "10.213.0.1", "10.213.0.2"
PORT = 5550
OVERRIDES = [
    "experiment=noise",
    "models=tiny",
    "inference.interval=0.01",
    f"hub={HUB_HOST}:{PORT}",
    f"controller.bind={HUB_HOST}",
    "controller.insecure=true",
]
needed = ("ip", "iptables", "unshare")
able = hasattr(os, "geteuid") and os.geteuid() == 0 and all(map(shutil.which, needed))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not able, reason=f"needs root and {', '.join(needed)}"),
]


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


class Hosts:
    """One host with controller and body, another with the trainer, and a cable between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.near, self.far = (f"ami{os.getpid()}{end}" for end in "nf")
        for name in (self.near, self.far):
            run("ip", "netns", "add", name)
            run("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")
        run("ip", "-n", self.near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.far)
        for name, address in ((self.near, HUB_HOST), (self.far, TRAINER_HOST)):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            run("ip", "-n", name, "link", "set", "cable", "up")
        self.processes: list[Process] = []

    def start(self, host: str, name: str, *before: str) -> Process:
        command = ["ip", "netns", "exec", host, *before, sys.executable, "-m", MODULES[name], *OVERRIDES]
        log = self._folder / f"{name}-{len(self.processes)}.log"
        process = Process(name, [*command, f"run_dir={self._folder}/run"], log, cwd=self._folder)
        self.processes.append(process)
        return process

    def ami(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["ip", "netns", "exec", self.near, sys.executable, "-m", "ami_controller.cli.main", *words]
        return subprocess.run([*command, "--hub", f"{HUB_HOST}:{PORT}"], capture_output=True, text=True, check=False)

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
        """Let both ends lose a share of all packets; 0 = none."""
        for host in (self.near, self.far):
            run("ip", "netns", "exec", host, "iptables", "-F", "INPUT")
            if share:
                match = ("-m", "statistic", "--mode", "random", "--probability", str(share))
                run("ip", "netns", "exec", host, "iptables", "-A", "INPUT", "-i", "cable", *match, "-j", "DROP")

    def close(self) -> None:
        for process in self.processes:
            process.close()
        for name in (self.near, self.far):
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "delete", name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.close()


def begin(hosts: Hosts, *before_trainer: str) -> None:
    hosts.start(hosts.near, "controller")
    hosts.start(hosts.far, "image_vae", *before_trainer)
    poll_for(lambda: hosts.service("image_vae").get("pid"), 60, "the trainer is there before the body is born")
    hosts.start(hosts.near, "body")
    poll_for(lambda: hosts.received() > 50, 60, "records flow between the hosts")


def all_arrived(hosts: Hosts) -> dict[str, Any]:
    """Pause, and return the stream's account when nothing is on its way any more."""
    poll_for(lambda: hosts.ami("pause").returncode == 0, 60, "paused")

    def arrived() -> dict[str, Any] | None:
        told = hosts.stream()
        return told if told and told["received"]["image_vae"] + told["lost"]["image_vae"] == told["published"] else None

    return poll_for(arrived, 60, "all arrived")


def test_a_cable_that_loses_packets_and_is_then_cut_for_half_a_minute(hosts: Hosts) -> None:
    begin(hosts)
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


def test_where_memory_is_out_of_reach_parameters_come_over_the_wire(hosts: Hosts) -> None:
    """Process numbers of another namespace are somebody else's, as they are on another machine."""
    begin(hosts, "unshare", "--pid", "--fork", "--kill-child")
    poll_for(lambda: (hosts.service("body").get("snapshots_received") or 0) > 3, 40, "snapshots arrive")
    body = hosts.service("body")
    assert body["snapshots_from_memory"] == 0
    assert body["wire_errors"] == 0


def test_memory_of_the_same_host_is_seen_and_a_killed_trainer_leaves_none_behind(hosts: Hosts) -> None:
    begin(hosts)

    def from_memory() -> int:
        return int(hosts.service("body").get("snapshots_from_memory") or 0)

    poll_for(lambda: from_memory() > 3, 40, "snapshots are seen in memory")
    trainer = hosts.processes[1]
    trainer.kill()
    time.sleep(3.0)
    before = from_memory()
    hosts.start(hosts.far, "image_vae")
    poll_for(lambda: from_memory() > before + 2, 60, "those of its successor, too")
    folder = f"/proc/{hosts.processes[2].pid}/fd"
    held = [os.readlink(f"{folder}/{descriptor}") for descriptor in os.listdir(folder)]
    assert sum(link.startswith("/memfd:ami") for link in held) <= 40
    assert all_arrived(hosts)["lost"]["image_vae"] == 0
