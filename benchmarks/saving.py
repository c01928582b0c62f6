"""What saving costs the living: ticks and gradient steps with and without a save under way, and time to the commit.

Fills the encoder's buffer with frames as fast as they come, ends that system with a checkpoint, and goes on from it
in real time. Then, in turns: so many seconds of ordinary life, and a save. Yardsticks of the same run: the time to
copy as many bytes in memory, and to write and sync them to a plain file of the same disk.

    python benchmarks/saving.py [--gigabytes 2] [--repeats 3] [--rate 10] [--dir /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from ending import end_with_children

from ami_controller.cli.client import Client
from ami_shared import wire
from ami_shared.bus import EXPERIENCE, HubAddress, Port, SocketOptions, make_socket
from ami_shared.errors import AmiError
from ami_shared.records import TOPIC, RecordBatch

FRAME_BYTES = 3 * 84 * 84
SETTLE_S = 5.0


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=5790)
    parser.add_argument("--dir", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Run it all, and print."""
    hub, frames = HubAddress("127.0.0.1", arguments.port), int(arguments.gigabytes * 1e9 / FRAME_BYTES)
    common = ["experiment=noise", "models=tiny", f"hub={hub}", f"run_dir={folder / 'run'}", "checkpoint.interval=null"]
    common += ["tracker.metrics_interval=1"]
    common += [f"trainers.image_vae.buffer.capacity={frames}", "trainers.image_vae.updates_per_record=1.0"]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; filling a buffer of {frames} frames", flush=True)
    with running(hub, folder, [*common, "pace=free", "checkpoint.timeout=600"]):
        wait_for(hub, lambda status: filled(status) >= frames, 1200.0)
    begin = time.monotonic()
    with running(hub, folder, [*common, f"inference.interval={1 / arguments.rate}", "checkpoint.at_shutdown=false"]):
        print(f"a system with that state runs again after {time.monotonic() - begin:.1f} s")
        runs = [one_round(hub, folder) for _ in range(arguments.repeats)]
        nbytes = runs[0]["bytes"]
    copying_s, writing_s = copy(int(nbytes)), write(folder / "plain", int(nbytes))
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print(f"medians of {arguments.repeats} saves of {nbytes / 1e9:.2f} GB\n")
    print(f"{'':<22} {'ordinary':>10} {'saving':>10}")
    for name, unit in (("tick p50", "ms"), ("tick p99", "ms"), ("tick max", "ms"), ("gradient step", "ms")):
        print(f"{name + ', ' + unit:<22} {median['ordinary ' + name]:>10.2f} {median['saving ' + name]:>10.2f}")
    print(f"{'late ticks, all runs':<22} {sum(r['ordinary late'] for r in runs):>10.0f}", end=" ")
    print(f"{sum(r['saving late'] for r in runs):>10.0f}")
    print(f"\ntrainer stalled {median['cut ms']:.0f} ms; copying as many bytes {copying_s * 1e3:.0f} ms", end=": ")
    print(f"{median['cut ms'] / copying_s / 1e3:.2f} × (aim: 1.5)")
    print(f"saved in {median['took s']:.1f} s, {nbytes / 1e6 / median['took s']:.0f} MB/s;", end=" ")
    print(f"a plain file, written and synced: {writing_s:.1f} s; ratio {writing_s / median['took s']:.2f}")


def one_round(hub: HubAddress, folder: Path) -> dict[str, float]:
    """Measure ordinary life for as long as a save takes, and life during a save."""
    with Client(hub) as client:
        collected: dict[str, Any] = {}
        with listening(hub) as batches:
            began = time.time()
            time.sleep(15.0)
            collected["ordinary"] = (began, time.time())
            began = time.time()
            saved = client.save(None, 600.0)
            collected["saving"] = (began, time.time())
            time.sleep(2.0)
    told: dict[str, float] = {"took s": saved["took_s"], "bytes": saved["bytes"], "cut ms": newest(folder, "cut_ms")}
    for name, (first, end) in collected.items():
        pairs = [(b.times, b.latenesses_s) for b in batches]
        times, latenesses = (np.concatenate(column) for column in zip(*pairs, strict=True))
        within = latenesses[(times >= first) & (times <= end)] * 1e3
        told[f"{name} tick p50"], told[f"{name} tick p99"] = (float(q) for q in np.quantile(within, (0.5, 0.99)))
        told[f"{name} tick max"] = float(within.max())
        told[f"{name} late"] = float((within > 10.0).sum())
        steps = [p["value"] for p in points(folder, "step_time_ms") if first <= p["time"] <= end + 1.0]
        told[f"{name} gradient step"] = statistics.median(steps) if steps else float("nan")
    return told


@contextmanager
def listening(hub: HubAddress) -> Iterator[list[RecordBatch]]:
    """Collect the body's records while the block runs."""
    batches: list[RecordBatch] = []
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    options = SocketOptions(EXPERIENCE.queue, EXPERIENCE.max_frame_bytes, b"", (TOPIC,))
    listener = make_socket(context, zmq.SUB, connect=hub.endpoint(Port.EXPERIENCE_OUT), options=options)
    ending = threading.Event()

    def listen() -> None:
        while not ending.is_set():
            if listener.poll(50):
                batches.append(RecordBatch.from_message(wire.decode(listener.recv_multipart())))
        listener.close()

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield batches
    finally:
        ending.set()
        thread.join()
        context.destroy(linger=0)


def points(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what the run's metrics tell of one metric of the trainer."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if f'"image_vae/{name}"' in line and line.endswith("}")]


def newest(folder: Path, name: str) -> float:
    """Return the newest value of a metric, once it has been written."""
    time.sleep(4.0)
    return float(points(folder, name)[-1]["value"])


def copy(nbytes: int) -> float:
    """Return the seconds that a copy of so many bytes into fresh memory takes; the best of three."""
    source, times = np.ones(nbytes, np.uint8), []
    for _ in range(3):
        begin = time.perf_counter()
        source.copy()
        times.append(time.perf_counter() - begin)
    return min(times)


def write(path: Path, nbytes: int) -> float:
    """Return the seconds that a plain file of so many bytes takes, sync included."""
    piece = os.urandom(4 << 20)
    begin = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(nbytes // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    took_s = time.perf_counter() - begin
    path.unlink()
    return took_s


def filled(status: dict[str, Any]) -> int:
    """Return the frames in the encoder's buffer."""
    for service in status["services"]:
        if service["name"] == "image_vae" and service["state"] == "running":
            return int(service["buffer"]["fill"])
    return 0


def wait_for(hub: HubAddress, condition: Any, timeout_s: float) -> None:
    """Return when a condition on the status holds."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with Client(hub) as client:
                if condition(client.status(timeout_s=1.0)):
                    return
        except AmiError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"it did not come to be within {timeout_s:g} s")


@contextmanager
def running(hub: HubAddress, folder: Path, overrides: list[str]) -> Iterator[None]:
    """Run `ami up` until the block ends."""
    with (folder / "up.log").open("w") as log:
        command = [sys.executable, "-m", "ami_controller.cli.main", "up", *overrides]
        up = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(hub, lambda status: status["system"] == "running", 300.0)
            time.sleep(SETTLE_S)
            yield
        finally:
            try:
                with Client(hub) as client:
                    client.command("shutdown", 600.0)
            except AmiError:
                up.terminate()
            up.wait(timeout=30)


if __name__ == "__main__":
    main()
