"""Several hosts on one machine: a network namespace each, with an address and a cable of its own to one switch."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import Process

SUBNET = "10.213.0"
OTHER_MACHINE = ("unshare", "--pid", "--fork", "--kill-child")  # before a command: its process numbers are its own


def needs(*programs: str) -> pytest.MarkDecorator:
    """Return the mark of a test that needs root, network namespaces and more programs."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    able = root and all(map(shutil.which, ("ip", *programs)))
    return pytest.mark.skipif(not able, reason=f"needs root, and {', '.join(('ip', *programs))}")


def run(*words: str) -> None:
    """Run a command of the system; raise where it fails."""
    subprocess.run(words, check=True, capture_output=True)


class Network:
    """Hosts by name; the first has the address .1, and so on."""

    def __init__(self, *hosts: str) -> None:
        self._space = {host: f"ami{os.getpid()}{host}" for host in hosts}
        self.address = {host: f"{SUBNET}.{n}" for n, host in enumerate(hosts, 1)}
        self._switch = f"ami{os.getpid()}switch"
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "switch", "up")
        for host, space in self._space.items():
            run("ip", "netns", "add", space)
            run("ip", "-n", space, "link", "set", "lo", "up")
            run("ip", "-n", space, "link", "add", "cable", "type", "veth", "peer", "name", host, "netns", self._switch)
            run("ip", "-n", self._switch, "link", "set", host, "master", "switch")
            run("ip", "-n", self._switch, "link", "set", host, "up")
            run("ip", "-n", space, "address", "add", f"{self.address[host]}/24", "dev", "cable")
            run("ip", "-n", space, "link", "set", "cable", "up")
        self.processes: list[Process] = []

    def command(self, host: str, *words: str) -> list[str]:
        """Return a command that runs on a host."""
        return ["ip", "netns", "exec", self._space[host], *words]

    def start(self, host: str, name: str, log: Path, *words: str, **options: Any) -> Process:
        """Start a process on a host."""
        self.processes.append(Process(name, self.command(host, *words), log, **options))
        return self.processes[-1]

    def lose_packets(self, host: str, share: float) -> None:
        """Let a host lose a share of all packets, both ways; 0 = none."""
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            run(*self.command(host, "iptables", "-F", chain))
            if share:
                match = ("-m", "statistic", "--mode", "random", "--probability", str(share))
                run(*self.command(host, "iptables", "-A", chain, way, "cable", *match, "-j", "DROP"))

    def pull_cable(self, host: str) -> None:
        """Cut a host off, without a word to either side."""
        run("ip", "-n", self._switch, "link", "set", host, "nomaster")

    def plug_cable(self, host: str) -> None:
        """Let a host be reached again."""
        run("ip", "-n", self._switch, "link", "set", host, "master", "switch")

    def close(self) -> None:
        for process in self.processes:
            process.close()
        for space in (*self._space.values(), self._switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "delete", space)
