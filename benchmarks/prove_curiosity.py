"""Proof: curiosity alone explores more of VizDoom's my_way_home than random action does.

The measure is the share of the reachable floor (cells of 32 map units) that an episode of 2,100 tics (600 steps,
the scenario's own length) has been to; nobody gets any reward from the world. Three explorers: the curious agent
(the experiment `doom` as `ami up` runs it, in lockstep), a random agent that draws every action anew, and one that
holds each choice for ten steps on average. Prints a table over stretches of life, and draws the curves.

    python benchmarks/prove_curiosity.py [--seeds 1 2 3] [--steps 100000] [--out runs/prove-curiosity] [override …]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ami_inference.environments import GymnasiumEnvironment

ENVIRONMENT = "ami_world.gymnasium_env:ami_world/Doom-v0"
STRETCHES = 5
Curve = list[tuple[int, float]]  # step at which an episode ended, share of the floor it had been to


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--port", type=int, default=5950)
    parser.add_argument("--out", type=Path, default=Path("runs/prove-curiosity"))
    arguments, overrides = parser.parse_known_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.steps} steps; {' '.join(overrides)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, arguments.steps, STRETCHES + 1).astype(int)
    heads = " ".join(f"{f'to {edge // 1000}k':>8}" for edge in edges[1:])
    print(f"{'explorer':<10} {'seed':>4} | {heads} | {'all':>6} {'steps/s':>8}", flush=True)
    curves: dict[str, dict[int, Curve]] = {}
    for name in ("uniform", "held", "curious"):
        for seed in arguments.seeds:
            begin = time.monotonic()
            if name == "curious":
                curve = live(seed, arguments, overrides)
            else:
                curve = act_at_random(seed, 1.0 if name == "uniform" else 10.0, arguments.steps)
            curves.setdefault(name, {})[seed] = curve
            speed = (curve[-1][0] if curve else 0) / (time.monotonic() - begin)
            parts = " ".join(f"{mean_between(curve, a, b):>8.3f}" for a, b in itertools.pairwise(edges))
            print(
                f"{name:<10} {seed:>4} | {parts} | {mean_between(curve, 0, arguments.steps):>6.3f} {speed:>8.0f}",
                flush=True,
            )
    (arguments.out / "curves.json").write_text(json.dumps(curves))
    last = edges[-2]
    means = {n: [mean_between(c, last, arguments.steps) for c in of.values()] for n, of in curves.items()}
    print(
        f"last stretch: curious worst {min(means['curious']):.3f}, uniform best {max(means['uniform']):.3f}, ", end=""
    )
    print(f"held best {max(means['held']):.3f}; curious/held {np.mean(means['curious']) / np.mean(means['held']):.2f}")
    print(f"curves: {draw(curves, arguments.out)}")
    sys.exit(0 if min(means["curious"]) > max(means["uniform"]) else 1)


def act_at_random(seed: int, hold_steps: float, steps: int) -> Curve:
    """Explore with actions that are redrawn with probability 1 / hold_steps, each dimension by itself."""
    random = np.random.default_rng(seed)
    environment = GymnasiumEnvironment(ENVIRONMENT, seed=seed)
    choices = np.array(environment.choices)
    action = random.integers(choices)
    curve: Curve = []
    for step in range(steps):
        if environment.observe().ending:
            curve.append((step, environment.metrics()["episode_explored_share"]))
            continue
        redraw = random.random(len(choices)) < 1 / hold_steps
        action = np.where(redraw, random.integers(choices), action)
        environment.act(action)
    environment.close()
    return curve


def live(seed: int, arguments: argparse.Namespace, overrides: Sequence[str]) -> Curve:
    """Run the curious agent for so many steps."""
    run_dir = arguments.out / f"curious-{seed}-{os.getpid()}"
    run_dir.mkdir(parents=True)
    command = [sys.executable, "-m", "ami_controller.cli.main", "up", "experiment=doom", f"seed={seed}", *overrides]
    command += [f"run_dir={run_dir}", f"hub=127.0.0.1:{arguments.port}"]
    metrics = run_dir / "metrics.jsonl"
    with (run_dir / "output.log").open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as up:
        try:
            while up.poll() is None:
                time.sleep(5.0)
                if metrics.exists() and (curve := read(metrics)) and curve[-1][0] >= arguments.steps - 601:
                    break
        finally:
            up.terminate()
    return read(metrics)


def read(metrics: Path) -> Curve:
    """Return the episodes that a run's metrics tell of."""
    curve: Curve = []
    for line in metrics.read_text().splitlines():
        if '"body/episode_explored_share"' in line and line.endswith("}"):
            point = json.loads(line)
            curve.append((point["step"], point["value"]))
    return curve


def mean_between(curve: Curve, begin: int, end: int) -> float:
    """Mean over the episodes that ended within (begin, end]."""
    shares = [share for step, share in curve if begin < step <= end]
    return float(np.mean(shares)) if shares else float("nan")


def draw(curves: dict[str, dict[int, Curve]], folder: Path) -> Path:
    """Write the curves as a picture: means over ten episodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for colour, (name, of_seeds) in zip(("tab:grey", "tab:blue", "tab:red"), curves.items(), strict=True):
        for n, curve in enumerate(of_seeds.values()):
            if len(curve) < 10:
                continue
            means = np.convolve([share for _, share in curve], np.full(10, 0.1), mode="valid")
            steps = [step for step, _ in curve][9:]
            axes.plot(steps, means, color=colour, alpha=0.8, linewidth=1, label=name if n == 0 else None)
    axes.set(xlabel="steps", ylabel="share of the floor an episode explores", ylim=(0, 1))
    axes.legend()
    path = folder / "curiosity.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
