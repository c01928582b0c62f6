"""What the trainer service costs a gradient step, beside the same step written plainly in one process.

Ours is the service's own training loop: buffer, guard, metrics, a snapshot copied, sealed and sent every second by the
publisher's thread, and records that keep coming ten times a second. The yardstick is the straightforward program
below: tensors in memory, forward, backward, step. Both in turns, several times; steps a second, medians.
Ours steps by the fused form of Adam. The plain program does so with --fused, which leaves the service's cost alone.

    python benchmarks/gradient_steps.py [--size small] [--seconds 4] [--repeats 9] [--threads 1] [--fused]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import zmq
from omegaconf import OmegaConf
from torch import nn

from ami_shared.bus import HubAddress
from ami_shared.clock import SystemClock
from ami_shared.config import build, load_config
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.metrics import MetricsQueue
from ami_shared.models.dynamics import decay_groups
from ami_shared.models.parameters import read_arrays
from ami_shared.models.policy_value import MultiCategorical
from ami_shared.models.replicas import Replicas
from ami_shared.models.vae import kl_to_standard_normal, reconstruction_loss, to_float
from ami_shared.records import Record, RecordBatch
from ami_shared.snapshots import Snapshot
from ami_trainer.publishing import SnapshotPublisher
from ami_trainer.training import Training

ENDLESS = {
    "image_vae": {"updates_per_record": 1e5},
    "forward_dynamics": {"updates_per_record": 1e5},
    "ppo": {"epochs": 100_000, "target_kl": None},
}
LIVED = 100  # batches that are made beforehand: to make them is not the service's work, and takes longer than its own
Step = Callable[[], None]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="the plain loop too uses the fused form of Adam")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config([f"models={arguments.size}"])
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.threads} threads, size {arguments.size}")
    print(f"{'trainer':<18} {'ours':>10} {'plain':>10}   steps/s {'ratio':>6}")
    for name, plain in (("image_vae", plain_vae), ("forward_dynamics", plain_dynamics), ("ppo", plain_ppo)):
        ratios, ours, theirs = [], [], []
        for _ in range(arguments.repeats):
            ours.append(served(config, name, arguments.seconds))
            theirs.append(looped(plain(config, arguments.fused or None), arguments.seconds))
            ratios.append(ours[-1] / theirs[-1])
        told = f"{statistics.median(ours):>10.1f} {statistics.median(theirs):>10.1f}"
        print(f"{name:<18} {told}           {statistics.median(ratios):>6.2f}", flush=True)


def served(config: Any, name: str, seconds: float) -> float:
    """Steps a second of the service's training loop."""
    section = {k: v for k, v in OmegaConf.to_container(config.trainers[name]).items() if k != "service"}
    trainer = build(section | ENDLESS[name], name)
    trainer.follow(ready_replicas(trainer.followed_models))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    hub = HubAddress("127.0.0.1", 5999)
    gate, metrics = Gate(), MetricsQueue()
    publisher = SnapshotPublisher(context, hub, Identity(name, "trainer"), trainer.published_models, 1.0)
    training = Training(
        trainer,
        gate,
        SystemClock(),
        publisher.offer_if_due,
        metrics.put,
        metrics.put_picture,
        picture_interval_s=1e9,
        metrics_interval_s=1.0,
    )
    lived = list(itertools.islice(life(config), LIVED))
    records = itertools.cycle(lived)
    for _ in range(20):
        trainer.consume(next(records), True)
    publisher.start()

    def live() -> None:
        while not gate.stopping:
            time.sleep(0.1)
            trainer.consume(next(records), True)
            training.new_data()

    threads = [threading.Thread(target=live), threading.Thread(target=training.run)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    begin, before = time.perf_counter(), training.updates
    time.sleep(seconds)
    rate = (training.updates - before) / (time.perf_counter() - begin)
    gate.stop()
    training.new_data()
    for thread in threads:
        thread.join()
    publisher.close()
    context.destroy(linger=0)
    return rate


def ready_replicas(models: Mapping[str, nn.Module]) -> Replicas:
    """Replicas that have had their first snapshot, as if a trainer ran beside this one."""
    replicas = Replicas(models)
    for name, module in models.items():
        replicas.offer(Snapshot(name, 1, time.time(), read_arrays(module)))
    replicas.swap()
    return replicas


def life(config: Any) -> Iterator[RecordBatch]:
    """An endless stream of batches of one body, as the curious agent leaves them; eight records each."""
    random = np.random.default_rng(0)
    dynamics = config.models.forward_dynamics
    shape = (dynamics.depth, dynamics.width)
    number = 0
    while True:
        records = []
        for _ in range(8):
            data = {
                "observation": random.integers(0, 256, (3, 84, 84), np.uint8),
                "hidden": random.normal(size=shape).astype(np.complex64),
                "action": random.integers(config.action.choices),
                "log_prob": np.float32(-4.0), "value": np.float32(0.0), "reward": np.float32(random.normal()),
                "rewarded": np.bool_(number > 0),
            }  # fmt: skip
            records.append(Record(0, number, 0.0, 0.0, {"policy_value": 1}, data))
            number += 1
        yield RecordBatch.stack("body", "one", records)


def looped(step: Step, seconds: float) -> float:
    """Steps a second of a bare loop."""
    for _ in range(3):
        step()
    begin, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        step()
        count += 1
    return count / spent


def plain_vae(config: Any, fused: bool | None) -> Step:
    """The encoder's gradient step, written down."""
    about = config.trainers.image_vae
    encoder, decoder = build(config.models.image_encoder, "e"), build(config.models.image_decoder, "d")
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=about.learning_rate, fused=fused)
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2048, 3, 84, 84), np.uint8)

    def step() -> None:
        batch = torch.from_numpy(frames[random.integers(2048, size=about.batch_size)])
        mean, deviation = encoder.posterior(batch)
        made = decoder(mean + deviation * torch.randn_like(deviation))
        loss = reconstruction_loss(made, to_float(batch)) + about.kl_weight * kl_to_standard_normal(mean, deviation)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()

    return step


def plain_dynamics(config: Any, fused: bool | None) -> Step:
    """The forward dynamics' gradient step, written down."""
    about, shape = config.trainers.forward_dynamics, config.models.forward_dynamics
    encoder, dynamics = build(config.models.image_encoder, "e").eval(), build(shape, "f")
    optimiser = torch.optim.AdamW(decay_groups(dynamics, about.weight_decay), lr=about.learning_rate, fused=fused)
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (2048, 3, 84, 84), np.uint8)  # numpy gathers rows faster than torch
    hidden = torch.randn(2048, shape.depth, shape.width, dtype=torch.complex64)
    actions = torch.stack([torch.randint(0, n, (2048,)) for n in config.action.choices], dim=1)
    length = about.window + 1

    def step() -> None:
        begins = random.integers(0, 2048 - length, about.batch_size)
        rows = begins[:, None] + np.arange(length)
        with torch.no_grad():
            embeddings = encoder(torch.from_numpy(frames[rows]).flatten(0, 1)).unflatten(0, rows.shape)
        means, _ = dynamics(embeddings[:, :-1], hidden[begins], actions[rows[:, :-1]])
        loss = torch.pi * (means[:, about.burn_in :] - embeddings[:, 1 + about.burn_in :]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dynamics.parameters(), about.max_grad_norm)
        optimiser.step()
        loss.item()

    return step


def plain_ppo(config: Any, fused: bool | None) -> Step:
    """PPO's gradient step, written down."""
    about = config.trainers.ppo
    policy = build(config.models.policy_value, "p")
    optimiser = torch.optim.AdamW(policy.parameters(), lr=about.learning_rate, eps=1e-5, fused=fused)
    count = about.rollout_length
    frames = torch.randint(0, 256, (count, 3, 84, 84), dtype=torch.uint8)
    actions = torch.stack([torch.randint(0, n, (count,)) for n in config.action.choices], dim=1)
    old, advantages, returns = torch.full((count,), -4.0), torch.randn(count), torch.randn(count)

    def step() -> None:
        rows = torch.randperm(count)[: about.batch_size]
        logits, values = policy(frames[rows])
        distribution = MultiCategorical(logits, policy.choices)
        ratio = (distribution.log_prob(actions[rows]) - old[rows]).exp()
        clipped = ratio.clamp(1 - about.clip, 1 + about.clip)
        gain = torch.minimum(ratio * advantages[rows], clipped * advantages[rows]).mean()
        value_loss = 0.5 * (values - returns[rows]).square().mean()
        loss = about.value_weight * value_loss - gain - about.entropy_weight * distribution.entropy().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), about.max_grad_norm)
        optimiser.step()
        loss.item()

    return step


if __name__ == "__main__":
    main()
