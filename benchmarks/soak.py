"""A life at ten times real time in which somebody dies or sleeps every half minute; what it cost is audited.

Controller, body and trainer are real processes; what was killed is started again at once. Beside them an auditor takes
the same stream as any trainer does, and looks at every record: each must come once and in order. A record may only be
missing where its body died before it was fetched; any other is an unexplained loss. The exit code is 1 where there is
one, where a process ended by itself, or where memory, descriptors, threads or shared memory grew.

    python benchmarks/soak.py [--minutes 60] [--every 30] [--seed N]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from auditor import Auditor
from ending import end_with_children
from footprint import taken_by, taken_by_family

from ami_controller.cli.client import Client
from ami_shared.bus import HubAddress
from ami_shared.config import load_config
from ami_shared.errors import AmiError

SERVICES = {"controller": "ami_controller.main", "image_vae": "ami_trainer.main", "body": "ami_inference.main"}
LONGEST_STOP_S = 8.0
BY_ITSELF = "ended by itself"
MOST_GROWTH = {
    "memory, MB": 80.0,
    "threads": 4.0,
    "descriptors": 12.0,
    "shared memory": 6.0,
}  # of the largest, by thirds


class Troupe:
    """The processes, and how much they took."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        self._overrides, self._folder = overrides, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.measured: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in (*SERVICES, "auditor")}
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
        taken = {name: taken_by_family(process.pid) for name, process in self.processes.items()}
        taken["auditor"] = taken_by(os.getpid())
        for name, amounts in taken.items():
            for what, amount in amounts.items():
                self.measured[name][what].append(amount)

    def close(self) -> None:
        for name in ("body", "image_vae", "controller"):
            self.processes[name].send_signal(signal.SIGCONT)
            self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """Entry point."""
    end_with_children()
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
                blows[f"{name} {BY_ITSELF}"] += 1
            if time.monotonic() >= next_blow:
                next_blow += every_s * chance.uniform(0.5, 1.5)
                blow = strike(troupe, chance)
                blows[blow] += 1
                print(f"{seconds - (end - time.monotonic()):6.0f} s  {blow}", flush=True)
        left = wait_for_all(auditor, HubAddress.parse(load_config(overrides).hub))
        return report(auditor, troupe, blows, left)
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


def wait_for_all(auditor: Auditor, hub: HubAddress) -> dict[str, int]:
    """Pause the system, and wait until all that was published has come; return who lacks how many records still."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        try:
            with Client(hub) as client:
                client.command("pause", 10.0)
            break
        except AmiError:
            time.sleep(1.0)
    left = {"the auditor": auditor.behind, "image_vae": 1}
    while any(left.values()) and time.monotonic() < deadline:
        time.sleep(0.2)
        with suppress(AmiError), Client(hub) as client:
            streams = [of for of in client.status()["experience"] if of["received"].get("image_vae")]
            behind = [of["behind"]["image_vae"] for of in streams] or [1]  # nothing yet: it has just begun
            audited = list(auditor.lives.values())[-1].end
            unheard = [of["published"] - audited for of in streams if of["published"]] or [1]
            left = {"the auditor": max(auditor.behind, *unheard), "image_vae": sum(behind)}
    return {name: count for name, count in left.items() if count}


def report(auditor: Auditor, troupe: Troupe, blows: dict[str, int], left: dict[str, int]) -> int:
    """Print what it cost; return 1 where something is wrong."""
    counted = next(iter(auditor.intake.streams.values())).counters
    print(f"\n{'what happened':<32} {'times':>6}")
    for blow, times in sorted(blows.items()):
        print(f"{blow:<32} {times:6}")
    print(f"\nrecords audited {auditor.records:,} of {len(auditor.lives)} lives")
    print(f"missed by the live stream {counted.missed:,}; duplicates refused {counted.duplicates:,}")
    print(f"died with their body {counted.lost:,}")
    print(f"out of order or twice {auditor.out_of_order}; unexplained losses {auditor.unexplained}")
    wrong = [f"{count} records never came to {name}" for name, count in left.items()]
    wrong += [f"{times} times {blow}" for blow, times in blows.items() if BY_ITSELF in blow]
    wrong += [f"a life begins at record {life.first}" for life in auditor.lives.values() if life.first]
    wrong += [f"{auditor.unexplained} records lost"] if auditor.unexplained else []
    wrong += [f"{auditor.out_of_order} batches out of order or twice"] if auditor.out_of_order else []
    for what, most in MOST_GROWTH.items():
        print(f"\n{what + ', largest in each third':<34}")
        for name, measured in troupe.measured.items():
            first, second, last = thirds(measured[what])
            print(f"{name:<14} {first:8.0f} {second:8.0f} {last:8.0f}")
            if last > max(first, second) + most:
                wrong.append(f"{what} of {name} grew from {max(first, second):.0f} to {last:.0f}")
    print("\n" + "\n".join(f"WRONG: {line}" for line in wrong) if wrong else "\nnothing wrong")
    return int(bool(wrong))


def thirds(values: list[float]) -> list[float]:
    third = max(1, len(values) // 3)
    return [max(values[n * third : (n + 1) * third] or [0]) for n in range(3)]


if __name__ == "__main__":
    main()
