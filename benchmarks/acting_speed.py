"""What one step of the whole curious agent costs, on one core or a GPU: encode, judge, decide, predict; by model size.

The yardstick is the same mathematics without a system round it: the three modules called in a bare loop.

    python benchmarks/acting_speed.py [--sizes tiny small reference large] [--steps 300] [--repeats 3] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from ami_inference.agents import CuriosityAgent
from ami_inference.rewards import NormalisedPredictionError
from ami_inference.sensors.sensor import Observation
from ami_shared.config import build, load_config
from ami_shared.models.replicas import Replicas

MODELS = ("image_encoder", "forward_dynamics", "policy_value")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "reference", "large"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    on = torch.cuda.get_device_name() + "; " if arguments.device.startswith("cuda") else ""
    print(f"{on}{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, 1 thread; ms a step, {arguments.repeats} runs")
    print(
        f"{'size':<10} {'agent p50':>9} {'p99':>7} {'bare p50':>9} {'ratio':>6} | "
        f"{'encode':>7} {'decide':>7} {'predict':>8}"
    )
    for size in arguments.sizes:
        runs = [measure(size, arguments.steps, torch.device(arguments.device)) for _ in range(arguments.repeats)]
        p50, p99, bare, *parts = (statistics.median(column) for column in zip(*runs, strict=True))
        told = " ".join(f"{part:>7.2f}" for part in parts)
        print(f"{size:<10} {p50:>9.2f} {p99:>7.2f} {bare:>9.2f} {p50 / bare:>6.2f} | {told}", flush=True)


def measure(size: str, steps: int, device: torch.device) -> tuple[float, ...]:
    """Return p50 and p99 of the agent, p50 of the bare modules, and p50 of each module, in ms."""
    config = load_config([f"models={size}"])
    replicas = Replicas({name: build(config.models[name], name).to(device) for name in MODELS})
    agent = CuriosityAgent(replicas, tuple(config.action.choices), NormalisedPredictionError())
    frame = np.random.default_rng(0).integers(0, 256, (3, 84, 84), np.uint8)

    def timed(call: Callable[[], object]) -> list[float]:
        return durations(call, steps, device)

    acting = timed(lambda: agent.step(Observation(frame)))
    encoder, dynamics, policy = (replicas[name] for name in ("image_encoder", "forward_dynamics", "policy_value"))
    pixels = torch.from_numpy(frame).unsqueeze(0).to(device)
    action = torch.zeros(1, len(config.action.choices), dtype=torch.int64, device=device)
    hidden = dynamics.initial_hidden(1)  # type: ignore[operator]
    with torch.inference_mode():
        embedding = encoder(pixels)
        parts = [
            timed(lambda: encoder(pixels)),
            timed(lambda: policy(pixels)),
            timed(lambda: dynamics.step(embedding, hidden, action)),  # type: ignore[operator]
        ]
        bare = timed(lambda: (dynamics.step(encoder(pixels), hidden, action), policy(pixels)))  # type: ignore[operator]
    p50s = [float(np.median(part)) for part in parts]
    return float(np.median(acting)), float(np.quantile(acting, 0.99)), float(np.median(bare)), *p50s


def durations(call: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Return the duration of each of so many calls, in ms, after a warm-up."""
    taken = []
    for _ in range(steps + 20):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - begin) * 1e3)
    return taken[20:]


if __name__ == "__main__":
    main()
