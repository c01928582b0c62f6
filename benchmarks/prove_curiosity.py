"""Proof: curiosity alone explores more of VizDoom's my_way_home than random action does.

The measure is the share of the reachable floor (cells of 32 map units) that an episode of 2,100 tics (600 steps,
the scenario's own length) has been to; nobody gets any reward from the world. Three explorers: the curious agent
(the experiment `doom` as `ami up` runs it, in lockstep), a random agent that draws every action anew, and one that
holds each choice for ten steps on average until it draws anew. A fourth, `rewarded`, shows what the policy could learn:
the same agent and policy, but paid for each new cell of an episode in place of its surprise. Beside it stands the share
that all episodes of 100,000 steps together have been to. All steps are the environment's: with --action-repeat N
everybody decides only at every N-th of them. Prints a table over stretches of life, and draws the curves.

    python benchmarks/prove_curiosity.py [--seeds 1 2 3] [--steps 300000] [--explorers uniform held curious rewarded]
        [--features image_vae] [--action-repeat 8] [--out runs/prove-curiosity] [override …]
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
from ending import end_with_children

from ami_inference.environments import GymnasiumEnvironment
from ami_world.gymnasium_env import STRETCH_STEPS

ENVIRONMENT = "ami_world.gymnasium_env:ami_world/Doom-v0"
FEATURES = ("image_vae", "random_features", "inverse_dynamics")
EXPLORERS = ("uniform", "held", "curious")
REWARDED = "rewarded"
PAID = ("inference/reward@inference.agent.reward=extrinsic", "+inference.environment.options.reward_of_a_cell=0.1")
HELD_STEPS = 10.0
EPISODE_STEPS = 600
STRETCHES = 5
SMOOTHED = 30  # episodes
Curve = list[tuple[int, float, float]]
"""Step at which an episode ended, share of the floor it had been to, and that of all its stretch of 100,000 steps."""


def main() -> None:
    """Entry point."""
    end_with_children()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--explorers", choices=(*EXPLORERS, REWARDED), nargs="+", default=EXPLORERS)
    parser.add_argument("--features", choices=FEATURES, default=FEATURES[0])
    parser.add_argument("--action-repeat", type=int, default=8)
    parser.add_argument("--port", type=int, default=5950)
    parser.add_argument("--out", type=Path, default=Path("runs/prove-curiosity"))
    arguments, overrides = parser.parse_known_args()
    overrides += [f"features={arguments.features}", f"inference.environment.action_repeat={arguments.action_repeat}"]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.steps} steps; {' '.join(overrides)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, arguments.steps, STRETCHES + 1).astype(int)
    heads = " ".join(f"{f'to {edge // 1000}k':>8}" for edge in edges[1:])
    print(f"{'explorer':<10} {'seed':>4} | {heads} | {'all':>6} {'steps/s':>8} | together, per 100k", flush=True)
    curves: dict[str, dict[int, Curve]] = {}
    for name in arguments.explorers:
        for seed in arguments.seeds:
            begin = time.monotonic()
            if name in ("curious", REWARDED):
                curve = live(name, seed, arguments, [*overrides, *(PAID if name == REWARDED else ())])
            else:
                hold_steps = HELD_STEPS if name == "held" else 1.0
                curve = act_at_random(seed, hold_steps, arguments.steps, arguments.action_repeat)
            curves.setdefault(name, {})[seed] = curve
            speed = (curve[-1][0] if curve else 0) / (time.monotonic() - begin)
            parts = " ".join(f"{mean_between(curve, a, b):>8.3f}" for a, b in itertools.pairwise(edges))
            unions = " ".join(f"{share:.3f}" for share in together(curve))
            share = mean_between(curve, 0, arguments.steps)
            print(f"{name:<10} {seed:>4} | {parts} | {share:>6.3f} {speed:>8.0f} | {unions}", flush=True)
    (arguments.out / "curves.json").write_text(json.dumps(curves))
    print(f"curves: {draw(curves, arguments.out)}")
    if set(curves) >= set(EXPLORERS):
        judge(curves, {"all": 0, "last stretch": edges[-2]}, arguments.steps)


def judge(curves: dict[str, dict[int, Curve]], begins: dict[str, int], end: int) -> None:
    """Compare the explorers from each of `begins` on; exit code 1 where a curious one is no better than chance in all.

    Args:
        begins: what the part of life from there to `end` is called → its first step.
    """
    better = []
    for part, begin in begins.items():
        means = {name: [mean_between(curve, begin, end) for curve in of.values()] for name, of in curves.items()}
        worst, chance = min(means["curious"]), max(means["uniform"])
        ratio = np.mean(means["curious"]) / np.mean(means["held"])
        print(f"{part}: curious worst {worst:.3f}, uniform best {chance:.3f}, ", end="")
        print(f"held best {max(means['held']):.3f}; curious/held {ratio:.2f}")
        better.append(worst > chance)
    sys.exit(0 if all(better) else 1)


def act_at_random(seed: int, hold_steps: float, steps: int, action_repeat: int) -> Curve:
    """Explore with actions that are held for so many steps on average, at least for one decision, each by itself."""
    random = np.random.default_rng(seed)
    environment = GymnasiumEnvironment(ENVIRONMENT, seed=seed, action_repeat=action_repeat)
    choices = np.array(environment.choices)
    action = random.integers(choices)
    curve: Curve = []
    while environment.steps < steps:
        if environment.observe().ending:
            told = environment.metrics()
            curve.append((environment.steps, told["episode_explored_share"], told["episode_stretch_explored_share"]))
            continue
        redraw = random.random(len(choices)) < action_repeat / hold_steps
        action = np.where(redraw, random.integers(choices), action)
        environment.act(action)
    environment.close()
    return curve


def live(name: str, seed: int, arguments: argparse.Namespace, overrides: Sequence[str]) -> Curve:
    """Run the agent for so many steps."""
    run_dir = arguments.out / f"{name}-{seed}-{os.getpid()}"
    run_dir.mkdir(parents=True)
    command = [sys.executable, "-m", "ami_controller.cli.main", "up", "experiment=doom", f"seed={seed}", *overrides]
    command += [f"run_dir={run_dir}", f"hub=127.0.0.1:{arguments.port}"]
    metrics = run_dir / "metrics.jsonl"
    with (run_dir / "output.log").open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as up:
        try:
            while True:
                time.sleep(5.0)
                if up.poll() is not None:
                    raise SystemExit(f"the system ended too early: see {run_dir / 'output.log'}")
                if metrics.exists() and (curve := read(metrics)) and curve[-1][0] > arguments.steps - EPISODE_STEPS:
                    break
        finally:
            up.terminate()
    return read(metrics)


def read(metrics: Path) -> Curve:
    """Return the episodes that a run's metrics tell of."""
    wanted = ("body/environment_steps", "body/episode_explored_share", "body/episode_stretch_explored_share")
    of_episodes: dict[int, dict[str, float]] = {}
    for line in metrics.read_text().splitlines():
        if any(f'"{name}"' in line for name in wanted) and line.endswith("}"):
            point = json.loads(line)
            of_episodes.setdefault(point["step"], {})[point["name"]] = point["value"]
    told = [[values.get(name) for name in wanted] for values in of_episodes.values()]
    return [(int(steps), share, union) for steps, share, union in told if None not in (steps, share, union)]


def together(curve: Curve) -> list[float]:
    """What the episodes of each 100,000 steps have been to together."""
    shares: dict[int, float] = {}
    for step, _, union in curve:
        stretch = (step - 1) // STRETCH_STEPS
        shares[stretch] = max(shares.get(stretch, 0.0), union)
    return list(shares.values())


def mean_between(curve: Curve, begin: int, end: int) -> float:
    """Mean over the episodes that ended within (begin, end]."""
    shares = [share for step, share, _ in curve if begin < step <= end]
    return float(np.mean(shares)) if shares else float("nan")


def draw(curves: dict[str, dict[int, Curve]], folder: Path) -> Path:
    """Write the curves as a picture: means over SMOOTHED episodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colours = dict(zip((*EXPLORERS, REWARDED), ("tab:grey", "tab:blue", "tab:red", "tab:green"), strict=True))
    for name, of_seeds in curves.items():
        for n, curve in enumerate(of_seeds.values()):
            if len(curve) < SMOOTHED:
                continue
            means = np.convolve([share for _, share, _ in curve], np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
            steps = [step for step, _, _ in curve][SMOOTHED - 1 :]
            axes.plot(steps, means, color=colours[name], alpha=0.8, linewidth=1, label=name if n == 0 else None)
    axes.set(xlabel="steps", ylabel="share of the floor an episode explores", ylim=(0, 1))
    axes.legend()
    path = folder / "curiosity.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
