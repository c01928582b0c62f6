"""Proof: PPO across separate processes learns CartPole-v1, in lockstep.

Runs the experiment `cartpole` as `ami up` does, once for each seed, until the mean return of the last 100 episodes
reaches the goal or the steps are used up. Prints a table, and writes the learning curves as a picture. The yardstick
is what the single-file PPO of CleanRL reports for CartPole-v1: about 490 after 500,000 steps.

    python benchmarks/prove_cartpole.py [--seeds 1 2 3] [--steps 500000] [--goal 475] [--out runs/prove-cartpole]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
from ending import end_with_children

EPISODES = 100


@dataclass
class Curve:
    """One seed's episodes: the step at which each ended, and its return."""

    steps: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)

    def mean_of_last(self) -> float:
        """Mean return of the last episodes; 0 while there are too few."""
        return float(np.mean(self.returns[-EPISODES:])) if len(self.returns) >= EPISODES else 0.0


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--goal", type=float, default=475.0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=5850)
    parser.add_argument("--out", type=Path, default=Path("runs/prove-cartpole"))
    parser.add_argument("--whole", action="store_true", help="go on to the last step after the goal is reached")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; goal: mean return {arguments.goal:g}", flush=True)
    print(f"{'seed':>4} {'reached':>8} {'steps':>8} {'mean of last 100':>17} {'seconds':>8} {'steps/s':>8}", flush=True)
    curves, passed = {}, True
    for seed in arguments.seeds:
        begin = time.monotonic()
        curve, reached = live(seed, arguments)
        seconds = time.monotonic() - begin
        curves[seed] = curve
        passed &= reached is not None
        last = curve.steps[-1] if curve.steps else 0
        told = f"{reached}" if reached is not None else "never"
        print(
            f"{seed:>4} {told:>8} {last:>8} {curve.mean_of_last():>17.1f} {seconds:>8.0f} {last / seconds:>8.0f}",
            flush=True,
        )
    print(f"curves: {draw(curves, arguments.goal, arguments.out)}")
    sys.exit(0 if passed else 1)


def live(seed: int, arguments: argparse.Namespace) -> tuple[Curve, int | None]:
    """Run one seed; return its curve and the step at which the goal was reached."""
    run_dir = arguments.out / f"seed-{seed}-{os.getpid()}"
    command = [sys.executable, "-m", "ami_controller.cli.main", "up", "experiment=cartpole", f"seed={seed}"]
    command += [f"run_dir={run_dir}", f"hub=127.0.0.1:{arguments.port}", "tracker.write_interval=0.5"]
    run_dir.mkdir(parents=True)
    curve, reached = Curve(), None
    deadline = time.monotonic() + arguments.minutes * 60
    with (run_dir / "output.log").open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as up:
        try:
            with (run_dir / "metrics.jsonl").open("a+") as metrics:
                metrics.seek(0)
                while up.poll() is None and time.monotonic() < deadline:
                    read(metrics, curve)
                    if reached is None and curve.mean_of_last() >= arguments.goal:
                        reached = curve.steps[-1]
                    if (reached is not None and not arguments.whole) or (curve.steps or [0])[-1] >= arguments.steps:
                        break
                    time.sleep(0.2)
        finally:
            up.terminate()
    within = reached is not None and reached <= arguments.steps
    return curve, reached if within else None


def read(metrics: TextIO, curve: Curve) -> None:
    """Take the episodes that have ended since the last call."""
    while (line := metrics.readline()).endswith("\n"):
        point = json.loads(line)
        if point["name"] == "body/episode_return":
            curve.steps.append(point["step"])
            curve.returns.append(point["value"])
    metrics.seek(metrics.tell() - len(line.encode()))  # a line that is not yet whole


def draw(curves: dict[int, Curve], goal: float, folder: Path) -> Path:
    """Write the learning curves as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for seed, curve in curves.items():
        if len(curve.returns) < EPISODES:
            continue
        means = np.convolve(curve.returns, np.full(EPISODES, 1 / EPISODES), mode="valid")
        axes.plot(curve.steps[EPISODES - 1 :], means, label=f"seed {seed}")
    axes.axhline(goal, color="grey", linestyle=":", label=f"goal {goal:g}")
    axes.set(
        xlabel="steps of the body",
        ylabel=f"mean return of the last {EPISODES} episodes",
        title="CartPole-v1, PPO across processes, lockstep",
    )
    axes.legend()
    path = folder / "cartpole.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
