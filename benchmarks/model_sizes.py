"""What each size of the models costs: parameters, snapshot bytes and times, gradient steps, memory; one process a size.

python benchmarks/model_sizes.py [--sizes tiny small reference large] [--steps 5] [--threads 1] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from ending import end_with_children
from omegaconf import OmegaConf

from ami_shared.config import build, load_config
from ami_shared.models.device import device_of, pinned_for
from ami_shared.models.parameters import copy_state, layout_of, read_arrays, write_arrays
from ami_shared.models.replicas import Replicas
from ami_shared.records import Record, RecordBatch
from ami_shared.snapshots import Snapshot

PUBLISHED = {"image_vae": "image_encoder", "forward_dynamics": "forward_dynamics", "ppo": "policy_value"}


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "reference", "large"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.steps, arguments.device)))
        return
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{os.cpu_count()} cores"
    print(f"{where}, load {os.getloadavg()[0]:.1f}, {arguments.threads} threads; medians of {arguments.steps} steps")
    heads = f"{'parameters':>13} {'step ms':>9} {'memory MB':>10} {'GPU MB':>8} | "
    heads += f"{'snapshot MB':>11} {'copy ms':>8} {'seal ms':>8} {'fill ms':>8}"
    print(f"{'size':<10} {'trainer':<17} {heads}", flush=True)
    for size in arguments.sizes:
        for name in PUBLISHED:
            command = [sys.executable, __file__, "--one", size, name, "--steps", str(arguments.steps)]
            command += ["--threads", str(arguments.threads), "--device", arguments.device]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{size:<10} {name:<17} failed: {done.stderr.strip().splitlines()[-1][:120]}", flush=True)
                continue
            told = json.loads(done.stdout)
            print(
                f"{size:<10} {name:<17} {told['parameters']:>13,} {told['step_ms']:>9.1f} {told['memory_mb']:>10.0f} "
                f"{told['gpu_mb']:>8.0f} | {told['snapshot_mb']:>11.1f} {told['copy_ms']:>8.1f} "
                f"{told['seal_ms']:>8.1f} {told['fill_ms']:>8.1f}",
                flush=True,
            )


def measure(size: str, name: str, steps: int, device: str) -> dict[str, float]:
    """Train one trainer for some steps, and send one snapshot as far as the wire."""
    config = load_config([f"models={size}", f"trainers.{name}.device={device}", "trainers.ppo.target_kl=null"])
    section: Any = OmegaConf.to_container(config.trainers[name])
    trainer = build({key: value for key, value in section.items() if key != "service"}, name)
    replicas = Replicas(trainer.followed_models)
    for followed, module in trainer.followed_models.items():  # no other trainer runs here
        replicas.offer(Snapshot(followed, 1, 0.0, read_arrays(module)))
    trainer.follow(replicas)
    trainer.consume(life(config), True)
    durations: list[float] = []
    while len(durations) <= steps:
        for metrics in trainer.train():
            durations.append(metrics["step_time_ms"])
            if len(durations) > steps:
                break
    memory_mb = psutil.Process().memory_info().rss / 1e6
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if device.startswith("cuda") else 0.0
    model = trainer.published_models[PUBLISHED[name]]
    arrays = read_arrays(model)
    layout = layout_of(model)
    memory = np.zeros(layout.nbytes, np.uint8)
    pinned_for(device_of(model))(memory)
    copies = layout.arrays(memory)
    copy_ms = timed(lambda: copy_state(model, copies))
    seal_ms = timed(lambda: Snapshot(name, 1, 0.0, arrays).to_message(name, name))
    fill_ms = timed(lambda: write_arrays(model, arrays))
    return {
        "parameters": sum(p.numel() for part in trainer.published_models.values() for p in part.parameters()),
        "step_ms": statistics.median(durations[1:]),
        "memory_mb": memory_mb,
        "gpu_mb": gpu_mb,
        "snapshot_mb": sum(array.nbytes for array in arrays.values()) / 1e6,
        "copy_ms": copy_ms,
        "seal_ms": seal_ms,
        "fill_ms": fill_ms,
    }


def life(config: Any) -> RecordBatch:
    """Enough records for each trainer to begin, as the curious agent leaves them."""
    random, dynamics = np.random.default_rng(0), config.models.forward_dynamics
    records = []
    for n in range(130):
        data = {
            "observation": random.integers(0, 256, (3, 84, 84), np.uint8),
            "hidden": random.normal(size=(dynamics.depth, dynamics.width)).astype(np.complex64),
            "action": random.integers(config.action.choices),
            "log_prob": np.float32(-4.0), "value": np.float32(0.0), "reward": np.float32(random.normal()),
            "rewarded": np.bool_(n > 0),
        }  # fmt: skip
        records.append(Record(0, n, 0.0, 0.0, {"policy_value": 0}, data))
    return RecordBatch.stack("body", "one", records)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call; the better of two."""
    durations = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        durations.append((time.perf_counter() - begin) * 1e3)
    return min(durations)


if __name__ == "__main__":
    main()
