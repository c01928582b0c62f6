"""A life at ten times real time in which somebody dies or sleeps every half minute; what it cost is audited.

Controller, body and trainer are real processes; what was killed is started again at once. Beside them an auditor takes
the same stream as any trainer does, and looks at every record: each must come once and in order. A record may only be
missing where its body died before it was fetched; any other is an unexplained loss, and ends with exit code 1.

    python benchmarks/soak.py [--minutes 60] [--every 30] [--seed N]
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import zmq

from ami_controller.cli.client import Client
from ami_shared.bus import HubAddress
from ami_shared.config import agreement, load_config
from ami_shared.control import ControlLink, Hooks
from ami_shared.errors import AmiError
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.metrics import MetricsQueue
from ami_shared.records import RecordBatch
from ami_trainer.intake import Intake

SERVICES = {"controller": "ami_controller.main", "image_vae": "ami_trainer.main", "body": "ami_inference.main"}
LONGEST_STOP_S = 8.0


@dataclass
class Life:
    """What the auditor saw of one incarnation of the body."""

    first: int
    end: int
    gaps: list[tuple[int, int]] = field(default_factory=list)


class Auditor:
    """A trainer that learns nothing and remembers everything."""

    def __init__(self, overrides: list[str]) -> None:
        config = load_config(overrides)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        hub, identity = HubAddress.parse(config.hub), Identity("auditor", "trainer", agreement(config))
        self.link = ControlLink(context, hub, identity, Gate(), MetricsQueue(), Hooks())
        self.intake = Intake(context, hub, identity, self._consume, 1 << 40, self.link.send, self._pass_cut)
        self.lives: dict[str, Life] = {}
        self.out_of_order = 0
        self.link.start()
        self.link.wait_joined()
        self.intake.start()

    def _consume(self, batch: RecordBatch, continues: bool) -> None:
        life = self.lives.setdefault(batch.incarnation, Life(batch.first_sequence, batch.first_sequence))
        self.out_of_order += batch.first_sequence < life.end
        if batch.first_sequence > life.end:
            life.gaps.append((life.end, batch.first_sequence))
        life.end = batch.end

    def _pass_cut(self) -> None:
        """It has nothing to save: it does not stand still at a checkpoint's cut."""
        if self.intake.cut:
            self.intake.pass_cut(self.intake.cut)

    @property
    def behind(self) -> int:
        return sum(stream.statistics()["behind"] for stream in list(self.intake.streams.values()))

    def close(self) -> None:
        self.intake.close()
        self.link.leave()


class Troupe:
    """The processes, and how much they took."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        self._overrides, self._folder = overrides, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.memory: dict[str, list[float]] = defaultdict(list)
        self.descriptors: dict[str, list[int]] = defaultdict(list)
        for name in SERVICES:
            self.start(name)

    def start(self, name: str) -> None:
        command = [sys.executable, "-m", SERVICES[name], *self._overrides]
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()
        self.start(name)

    def revive(self) -> list[str]:
        """Start again whoever ended by itself; return their names."""
        ended = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in ended:
            self.start(name)
        return ended

    def measure(self) -> None:
        for name, process in [*self.processes.items(), ("auditor", None)]:
            seen = psutil.Process(process.pid if process else None)
            self.memory[name].append(seen.memory_info().rss / 1e6)
            self.descriptors[name].append(seen.num_fds() if hasattr(seen, "num_fds") else 0)

    def close(self) -> None:
        for name in ("body", "image_vae", "controller"):
            self.processes[name].terminate()
        for process in self.processes.values():
            process.wait(timeout=30)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two blows")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--port", type=int, default=5670)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["experiment=noise", f"hub=127.0.0.1:{arguments.port}", f"run_dir={folder}/run"]
        overrides += ["models=tiny", "inference.interval=0.01", "checkpoint.interval=null"]
        sys.exit(live(overrides, Path(folder), arguments.minutes * 60, arguments.every, random.Random(seed)))


def live(overrides: list[str], folder: Path, seconds: float, every_s: float, chance: random.Random) -> int:
    """Let the system live; return the exit code."""
    troupe = Troupe(overrides, folder)
    auditor = Auditor(overrides)
    blows: dict[str, int] = defaultdict(int)
    end, next_blow = time.monotonic() + seconds, time.monotonic() + every_s
    try:
        while time.monotonic() < end:
            time.sleep(1.0)
            troupe.measure()
            for name in troupe.revive():
                blows[f"{name} ended by itself"] += 1
            if time.monotonic() >= next_blow:
                next_blow += every_s * chance.uniform(0.5, 1.5)
                blow = strike(troupe, chance)
                blows[blow] += 1
                print(f"{seconds - (end - time.monotonic()):6.0f} s  {blow}", flush=True)
        wait_for_all(auditor, HubAddress.parse(load_config(overrides).hub))
        return report(auditor, troupe, blows)
    finally:
        auditor.close()
        troupe.close()


def strike(troupe: Troupe, chance: random.Random) -> str:
    """Do something bad to somebody."""
    name = chance.choice(list(SERVICES))
    if chance.random() < 0.6:
        troupe.kill(name)
        return f"kill -9 {name}"
    process = troupe.processes[name]
    process.send_signal(signal.SIGSTOP)
    time.sleep(chance.uniform(0.5, LONGEST_STOP_S))
    process.send_signal(signal.SIGCONT)
    return f"stopped {name} for a while"


def wait_for_all(auditor: Auditor, hub: HubAddress) -> None:
    """Pause the system, and wait until the auditor has all that was published."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        try:
            with Client(hub) as client:
                client.command("pause", 10.0)
            break
        except AmiError:
            time.sleep(1.0)
    while auditor.behind and time.monotonic() < deadline:
        time.sleep(0.2)


def report(auditor: Auditor, troupe: Troupe, blows: dict[str, int]) -> int:
    """Print what it cost; return 1 where a record is missing that need not be."""
    counted = next(iter(auditor.intake.streams.values())).counters
    unexplained = sum(end - first for life in auditor.lives.values() for first, end in life.gaps)
    print(f"\n{'what happened':<32} {'times':>6}")
    for blow, times in sorted(blows.items()):
        print(f"{blow:<32} {times:6}")
    records = sum(life.end - life.first for life in auditor.lives.values())
    print(f"\nrecords audited {records:,} of {len(auditor.lives)} lives; missed by the live stream {counted.missed:,}")
    print(f"duplicates refused {counted.duplicates:,}; died with their body {counted.lost:,}")
    print(f"out of order or twice {auditor.out_of_order}; unexplained losses {unexplained}; behind {auditor.behind}")
    print(f"\n{'largest in each third':<14} {'memory, MB':>28} {'descriptors':>24}")
    for name, memory in troupe.memory.items():
        sizes, counts = (" ".join(f"{value:8.0f}" for value in thirds(of)) for of in (memory, troupe.descriptors[name]))
        print(f"{name:<14} {sizes:>28} {counts:>24}")
    return int(bool(unexplained or auditor.out_of_order or auditor.behind))


def thirds(values: list[float] | list[int]) -> list[float]:
    third = max(1, len(values) // 3)
    return [max(values[n * third : (n + 1) * third] or [0]) for n in range(3)]


if __name__ == "__main__":
    main()
