"""How late the body's ticks are, with the trainer idle and training at full speed, beside a bare timer loop.

Runs the whole system as `ami up` does, at 10 and 60 steps a second, and takes the lateness of every tick from the
records themselves. A bare timer loop (the same grid and nothing else) runs beside it in a process of its own at the
same time: the yardstick. Repeats, and prints medians over the repeats.

    python benchmarks/tick_lateness.py [--seconds 20] [--repeats 3] [--rates 10 60] [--experiment simulated]
        [override …]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zmq
from ending import end_with_children

from ami_controller.cli.client import Client
from ami_shared import wire
from ami_shared.bus import EXPERIENCE, HubAddress, Port, SocketOptions, make_socket
from ami_shared.clock import Grid, SystemClock
from ami_shared.config import load_config
from ami_shared.errors import AmiError
from ami_shared.records import TOPIC, RecordBatch

SETTLE_S = 8.0
LOADS = {
    "idle": [
        "trainers.image_vae.updates_per_record=1.0e-6",
        "trainers.forward_dynamics.updates_per_record=1.0e-6",
        "trainers.ppo.rollout_length=100000",
    ],
    "training": [
        "trainers.image_vae.updates_per_record=1000",
        "trainers.forward_dynamics.updates_per_record=1000",
        "trainers.ppo.rollout_length=32",
        "trainers.ppo.epochs=1000",
        "trainers.ppo.target_kl=null",
    ],
}


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, 60.0])
    parser.add_argument("--experiment", default="simulated")
    parser.add_argument("--port", type=int, default=5750)
    parser.add_argument("--bare", type=float, help=argparse.SUPPRESS)
    arguments, arguments.overrides = parser.parse_known_args()
    if arguments.bare:
        print(json.dumps(bare_latenesses(arguments.bare, arguments.seconds)))
        return
    print(f"{os.cpu_count()} cores, {arguments.repeats} runs of {arguments.seconds:g} s a row; lateness in ms, medians")
    print("load is the 1-minute average before the row; drift is the grid's, in ms a minute")
    columns = ("p50", "p95", "p99", "max")
    print(f"{'rate':>5} {'trainer':>9} {'load':>5} | " + " ".join(f"{'body ' + c:>9}" for c in columns), end=" | ")
    print(" ".join(f"{'bare ' + c:>9}" for c in columns) + f" | {'updates/s':>9} {'drift':>7} {'skipped':>7}")
    p99 = {}
    for rate in arguments.rates:
        for load in LOADS:
            p99[rate, load] = print_row(rate, load, arguments)
        difference = p99[rate, "training"] - p99[rate, "idle"]
        print(f"      at {rate:g} steps a second training changes p99 by {difference:+.2f} ms (aim: less than 1)")


def print_row(rate: float, load: str, arguments: argparse.Namespace) -> float:
    """Measure and print one row; return the body's median p99 in ms."""
    load_before = os.getloadavg()[0]
    runs = [measure(rate, load, arguments) for _ in range(arguments.repeats)]
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    names = ("p50", "p95", "p99", "max")
    print(f"{rate:5g} {load:>9} {load_before:5.2f} | ", end="")
    print(" ".join(f"{median['body ' + n]:9.2f}" for n in names), end=" | ")
    print(" ".join(f"{median['bare ' + n]:9.2f}" for n in names), end=" | ")
    print(f"{median['updates']:9.1f} {median['drift']:7.2f} {median['skipped']:7.0f}", flush=True)
    return median["body p99"]


def measure(rate: float, load: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run the system once, and return quantiles of body and bare loop."""
    hub = HubAddress("127.0.0.1", arguments.port)
    overrides = [f"experiment={arguments.experiment}", f"inference.interval={1 / rate}", *arguments.overrides]
    overrides += LOADS[load]
    with tempfile.TemporaryDirectory() as run_dir, running_system(overrides, hub, Path(run_dir)):
        time.sleep(SETTLE_S)
        bare = subprocess.Popen(
            [sys.executable, __file__, "--bare", str(1 / rate), "--seconds", str(arguments.seconds)],
            stdout=subprocess.PIPE,
        )
        try:
            batches = collect(hub, arguments.seconds)
            bare_output, _ = bare.communicate()
        finally:
            bare.kill()
        with Client(hub) as client:
            services = {service["name"]: service for service in client.status()["services"]}
    latenesses = np.concatenate([batch.latenesses_s for batch in batches]) * 1e3
    times = np.concatenate([batch.times for batch in batches])
    return {
        **quantiles("body", latenesses),
        **quantiles("bare", np.array(json.loads(bare_output))),
        "drift": drift_ms_per_minute(times, 1 / rate),
        "updates": sum(service["rate_hz"] for service in services.values() if service["role"] == "trainer"),
        "skipped": services["body"]["skipped_ticks"],
    }


@contextmanager
def running_system(overrides: Sequence[str], hub: HubAddress, run_dir: Path) -> Iterator[None]:
    """Run `ami up` until the block ends."""
    places = [f"hub={hub}", f"run_dir={run_dir}", *overrides]
    if load_config(places).name == "simulated":
        places += [f"world.http_port={hub.port + 10}", f"world.osc_port={hub.port + 11}"]
    log = (run_dir / "bench.log").open("w")
    up = subprocess.Popen(
        [sys.executable, "-m", "ami_controller.cli.main", "up", *places], stdout=log, stderr=subprocess.STDOUT
    )
    try:
        wait_until_running(up, hub, run_dir / "bench.log")
        yield
    finally:
        try:
            with Client(hub) as client:
                client.command("shutdown", 10.0)
        except AmiError:
            up.terminate()
        up.wait(timeout=300)  # large parameters are written at the end


def wait_until_running(up: subprocess.Popen[bytes], hub: HubAddress, log: Path, timeout_s: float = 180.0) -> None:
    """Return when every service runs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and up.poll() is None:
        try:
            with Client(hub) as client:
                if client.status(timeout_s=1.0)["system"] == "running":
                    return
        except AmiError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the system did not start:\n{log.read_text()}")


def collect(hub: HubAddress, seconds: float) -> list[RecordBatch]:
    """Listen to the experience stream for so long."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    options = SocketOptions(EXPERIENCE.queue, EXPERIENCE.max_frame_bytes, b"", (TOPIC,))
    listener = make_socket(context, zmq.SUB, connect=hub.endpoint(Port.EXPERIENCE_OUT), options=options)
    batches, deadline = [], time.monotonic() + seconds
    while (left_s := deadline - time.monotonic()) > 0:
        if listener.poll(int(left_s * 1000)):
            batches.append(RecordBatch.from_message(wire.decode(listener.recv_multipart())))
    context.destroy(linger=0)
    return batches


def bare_latenesses(interval_s: float, seconds: float) -> list[float]:
    """Run a bare timer loop; return the lateness of every tick in ms."""
    grid = Grid(interval_s, SystemClock())
    return [grid.wait().lateness_s * 1e3 for _ in range(int(seconds / interval_s))]


def quantiles(name: str, latenesses_ms: np.ndarray) -> dict[str, float]:
    """Return p50, p95, p99 and max."""
    p50, p95, p99 = np.quantile(latenesses_ms, (0.5, 0.95, 0.99))
    return {f"{name} p50": p50, f"{name} p95": p95, f"{name} p99": p99, f"{name} max": latenesses_ms.max()}


def drift_ms_per_minute(times: np.ndarray, interval_s: float) -> float:
    """Return by how much the steps wander from their grid: the slope of time against number of intervals."""
    numbers = np.round((times - times[0]) / interval_s)
    slope = np.polyfit(numbers, times - times[0] - numbers * interval_s, 1)[0]
    return float(slope / interval_s * 60 * 1e3)


if __name__ == "__main__":
    main()
