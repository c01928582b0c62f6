"""What keys cost: the same hub without and with them, in turns: records a second, snapshots over TCP, round trips.

python benchmarks/keys_cost.py [--records 40000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ending import end_with_children
from snapshots import MODEL, control_round_trip, through
from streams import raw_tcp, stream_through, wait_until_idle

from ami_controller.key_folder import KeyFolder
from ami_shared.bus import HubAddress
from ami_shared.keys import KeyFile

MIB = 1 << 20


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=40_000)
    parser.add_argument("--size", type=int, default=25_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=5680)
    arguments = parser.parse_args()
    runs: dict[str, dict[bool, list[float]]] = {}
    raw = []
    for _ in range(arguments.repeats):
        raw.append(raw_tcp(arguments.records, arguments.size))
        for keys in (False, True):
            for name, value in measure(arguments, keys).items():
                runs.setdefault(name, {False: [], True: []})[keys].append(value)
    print(
        f"{os.cpu_count()} cores; medians of {arguments.repeats} runs; raw TCP {statistics.median(raw):.0f} records/s"
    )
    print(f"{'':<34} {'without keys':>13} {'with keys':>10} {'ratio':>6}")
    for name, of in runs.items():
        without, with_keys = statistics.median(of[False]), statistics.median(of[True])
        print(f"{name:<34} {without:13.1f} {with_keys:10.1f} {with_keys / without:6.2f}")


def measure(arguments: argparse.Namespace, keys: bool) -> dict[str, float]:
    """Return all figures of one hub."""
    hub = HubAddress("127.0.0.1", arguments.port)
    with tempfile.TemporaryDirectory() as folder, controller(hub, Path(folder), keys) as overrides:
        files = {name: Path(folder) / f"{name}.json" for name in ("image_vae", "body", "me")}
        joins = ([f"join={files['image_vae']}"], [f"join={files['body']}"]) if keys else ([], [])
        of = {n: hub.with_credentials(KeyFile.load(file).credentials if keys else None) for n, file in files.items()}
        told = {f"records of {arguments.size} bytes over TCP, 1/s": stream_through(overrides, arguments, False, joins)}
        for mib in (1, 16, 128):
            took, _, _ = through(of["image_vae"], mib * MIB, 8, shared=False, body_hub=of["body"])
            told[f"snapshot of {mib} MiB over TCP, ms"] = took
        told["control round trip, us"] = control_round_trip(of["me"])
        return told


@contextmanager
def controller(hub: HubAddress, folder: Path, keys: bool) -> Iterator[list[str]]:
    """A real controller for the block; yields the overrides of its system."""
    overrides = [
        "experiment=noise",
        f"hub={hub}",
        f"run_dir={folder}/run",
        f"trainers.image_vae.service.publishes=[{MODEL}]",
    ]
    more = []
    if keys:
        made = KeyFolder(folder / "keys")
        made.init(hub)
        for name, role in (("image_vae", "trainer"), ("body", "body"), ("me", "operator")):
            made.add(name, role, folder / f"{name}.json")
        more = [f"controller.key_folder={folder}/keys"]
    command = [sys.executable, "-m", "ami_controller.main", *overrides, *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        wait_until_idle(process.pid)
        yield overrides
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


if __name__ == "__main__":
    main()
