"""Half an hour of the whole system in real time: what came late, was lost, was learned, and the memory it took.

Runs `ami up` as anybody does, and reads what the run wrote itself: its metrics, and its status at the end. The run's
folder stays, with the pictures of what was seen, predicted and dreamt.

    python benchmarks/half_hour.py [--minutes 31] [--out runs/half-hour] [override …]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from ending import end_with_children
from tick_lateness import running_system

from ami_controller.cli.client import Client
from ami_shared.bus import HubAddress

PART_S = 180.0
CURVES = (
    "body/tick_lateness_ms/p50",
    "body/tick_lateness_ms/p99",
    "image_vae/fresh_reconstruction_error",
    "forward_dynamics/fresh_loss",
    "forward_dynamics/fresh_loss_of_no_change",
    "body/reward",
    "ppo/entropy",
    "ppo/policy_lag",
)
OF_EACH_SERVICE = ("step_time_ms", "snapshot_copy_ms", "memory_bytes", "gpu_memory_bytes")


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=31.0)
    parser.add_argument("--port", type=int, default=5850)
    parser.add_argument("--out", type=Path, default=Path("runs/half-hour"))
    arguments, overrides = parser.parse_known_args()
    hub = HubAddress("127.0.0.1", arguments.port)
    run_dir = arguments.out / time.strftime("%Y-%m-%d_%H-%M-%S")
    run_dir.mkdir(parents=True)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.minutes:g} minutes; {run_dir}", flush=True
    )
    status = live(hub, run_dir, arguments.minutes * 60.0, overrides)
    print_ends(status)
    print_curves(read(run_dir / "metrics.jsonl"))


def live(hub: HubAddress, run_dir: Path, seconds: float, overrides: list[str]) -> dict[str, Any]:
    """Let the system live for so long; return its status at the end."""
    with running_system(overrides, hub, run_dir):
        time.sleep(seconds)
        with Client(hub) as client:
            return client.status()


def read(metrics: Path) -> dict[str, np.ndarray]:
    """Return of every curve the times in seconds and the values, (N, 2)."""
    points = defaultdict(list)
    for line in metrics.read_text().splitlines():
        point = json.loads(line)
        points[point["name"]].append((point["time"], point["value"]))
    return {name: np.array(of) for name, of in points.items()}


def print_curves(curves: dict[str, np.ndarray]) -> None:
    """Print means over the first minutes that there is anything of, over the last ones, and the largest of all."""
    print(f"{'':<42} {'first 3 min':>12} {'last 3 min':>12} {'largest':>10}")
    of_all = [name for name in curves if name.rpartition("/")[2] in OF_EACH_SERVICE]
    for name in [*(name for name in CURVES if name in curves), *sorted(of_all)]:
        times, values = curves[name].T
        first, last = values[times < times[0] + PART_S].mean(), values[times > times[-1] - PART_S].mean()
        print(f"{name:<42} {first:12.4g} {last:12.4g} {values.max():10.4g}")


def print_ends(status: dict[str, Any]) -> None:
    """Print what was counted until the end."""
    of = {service["name"]: service for service in status["services"]}
    body = of["body"]
    lateness = ", ".join(f"{name} {value:.2f}" for name, value in body["tick_lateness_ms"].items())
    print(f"ticks: {body['steps']}, late {body['late_ticks']}, skipped {body['skipped_ticks']}; ms, newest: {lateness}")
    (stream,) = status["experience"]
    for trainer, received in stream["received"].items():
        counters = ", ".join(f"{name} {stream[name][trainer]}" for name in ("lost", "missed", "duplicates"))
        print(f"{trainer}: received {received} of {stream['published']}, {counters}; ", end="")
        print(f"waited {of[trainer]['waiting_share']:.2f} of the time, {of[trainer]['steps']} gradient steps")
    print(f"ppo: {json.dumps(of['ppo']['limiter'])}")
    for model in status["models"]:
        used = f"the body has {model['used']['body']}; " if model["used"] else ""
        print(f"{model['name']}: version {model['version']}; {used}{model['bytes'] / 1e6:,.1f} MB")
    print(f"checkpoint: {json.dumps(status['hub']['checkpoint'])}")


if __name__ == "__main__":
    main()
