"""A program that trains alone and shared by two ranks, and leaves what became of the parameters: sharing.py FOLDER.

Started once for each rank, with the environment that torchrun gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experience import batches, record
from learning import SIZE, batch_of
from torch import Tensor, nn

from ami_shared.models.dynamics import ForwardDynamics
from ami_shared.models.inverse_dynamics import InverseDynamics
from ami_shared.models.policy_value import PolicyValueCommonNet, VectorTrunk
from ami_shared.models.replicas import Replicas
from ami_shared.models.vae import to_float
from ami_shared.records import Record, RecordBatch
from ami_shared.snapshots import Snapshot
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.data_parallel import Batch, Losses, Order, Team, form_team
from ami_trainer.optimisation import GuardedOptimiser
from ami_trainer.trainers import ForwardDynamicsTrainer, ImageVAETrainer, InverseDynamicsTrainer, PPOTrainer

Numbers = dict[str, np.ndarray[Any, Any]]


class PlainEncoder(nn.Module):
    """No batch norm, and as good as no noise: then it does not matter who computes which frame."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, 8)

    def forward(self, observation: Tensor) -> Tensor:
        embedding: Tensor = self.linear(to_float(observation).flatten(-3))
        return embedding

    def posterior(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean = self(observation)
        return mean, torch.full_like(mean, 1e-6)


class PlainDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3 * SIZE * SIZE)

    def forward(self, embedding: Tensor) -> Tensor:
        frames: Tensor = self.linear(embedding).unflatten(-1, (3, SIZE, SIZE))
        return frames


class Scenario:
    """Something that trains."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.metrics: list[dict[str, float]] = []

    def share(self, team: Team) -> None:
        self.trainer.share(team)

    def train(self) -> None:
        self.feed()
        while self.trainer.is_trainable():
            self.metrics += [dict(step) for step in self.trainer.train()]

    def feed(self) -> None:
        raise NotImplementedError

    def outcome(self) -> Numbers:
        numbers = {f"loss {n}": np.asarray(metrics["loss"]) for n, metrics in enumerate(self.metrics)}
        for model in self.trainer.published_models.values():
            numbers |= {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
        return numbers


class Policy(Scenario):
    """Minibatches of five, which two ranks cannot halve; and parameters that are replaced from outside in between."""

    def __init__(self) -> None:
        self.policy = PolicyValueCommonNet(VectorTrunk(2, 8), (3,))
        super().__init__(PPOTrainer(self.policy, 10, epochs=2, batch_size=5, learning_rate=1e-2))

    def feed(self) -> None:
        for batch in batches([record(n) for n in range(21)]):
            self.trainer.consume(batch, True)

    def train(self) -> None:
        super().train()
        torch.manual_seed(7)
        self.policy.load_state_dict({name: torch.randn_like(t) / 9 for name, t in self.policy.state_dict().items()})
        super().train()


class Encoder(Scenario):
    def __init__(self) -> None:
        buffer = RandomImageBuffer(64, SIZE, SIZE)
        settings = {"batch_size": 8, "first_after": 4, "updates_per_record": 1.0, "kl_weight": 1e-4}
        super().__init__(ImageVAETrainer(PlainEncoder(), PlainDecoder(), buffer, **settings))

    def feed(self) -> None:
        self.trainer.consume(batch_of(12), True)


class Dynamics(Scenario):
    """Needs an encoder that the other ranks have only from rank 0."""

    def __init__(self) -> None:
        dynamics = ForwardDynamics(8, (3,), width=8, depth=2, feedforward=8, dropout=0.0)
        settings = {"window": 4, "burn_in": 1, "batch_size": 4, "first_after": 8, "updates_per_record": 0.5}
        super().__init__(ForwardDynamicsTrainer(dynamics, PlainEncoder(), PlainDecoder(), **settings))
        self.replicas = Replicas(self.trainer.followed_models)
        self.trainer.follow(self.replicas)
        self.random = np.random.default_rng(0)

    def train(self) -> None:
        for version in (1, 2):
            torch.manual_seed(version)
            arrays = {name: tensor.numpy() for name, tensor in PlainEncoder().state_dict().items()}
            self.replicas.offer(Snapshot("image_encoder", version, 0.0, arrays))
            super().train()

    def feed(self) -> None:
        self.trainer.consume(seen_and_done(20, self.random), False)


class Inverse(Scenario):
    def __init__(self) -> None:
        settings = {"batch_size": 4, "first_after": 8, "updates_per_record": 0.5}
        super().__init__(InverseDynamicsTrainer(PlainEncoder(), InverseDynamics(8, (3,), hidden=8), **settings))

    def feed(self) -> None:
        self.trainer.consume(seen_and_done(20, np.random.default_rng(0)), False)


def seen_and_done(count: int, random: np.random.Generator) -> RecordBatch:
    """Random frames, with the columns that a curious agent leaves."""
    records = []
    for n in range(count):
        hidden = random.normal(size=(2, 8)).astype(np.complex64)
        frame = random.integers(0, 256, (3, SIZE, SIZE), np.uint8)
        data = {"observation": frame, "hidden": hidden, "action": np.array([n % 3])}
        records.append(Record(0, n, 0.0, 0.0, {}, data))
    return RecordBatch.stack("body", "a", records)


class Poison(Scenario):
    """Every third minibatch holds something that is not finite, in the share of rank 1."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.adam = torch.optim.Adam(self.net.parameters(), 0.01)
        self.guard = GuardedOptimiser({"net": self.net}, self.adam, patience=3)
        self.metrics, self.told = [], {}

    def share(self, team: Team) -> None:
        self.guard.share(team, self.losses)

    def losses(self, batch: Batch) -> Losses:
        return {"loss": self.net(batch[0]).square().mean()}

    def train(self) -> None:
        for n in range(6):
            batch = torch.randn(8, 2)
            batch[6] = float("nan") if n % 3 == 2 else batch[6]
            before = [tensor.clone() for tensor in self.net.state_dict().values()]
            self.metrics.append(self.guard.step_on((batch,), self.losses))
            same = all(map(torch.equal, before, self.net.state_dict().values()))
            self.told[f"changed {n}"] = np.asarray(not same)

    def outcome(self) -> Numbers:
        finite = all(bool(tensor.isfinite().all()) for tensor in self.net.state_dict().values())
        skipped = [metrics["skipped"] for metrics in self.metrics]
        return {**self.told, "finite": np.asarray(finite), "skipped": np.asarray(skipped)}


SCENARIOS: tuple[Callable[[], Scenario], ...] = (Policy, Encoder, Dynamics, Inverse, Poison)


def lived(make: Callable[[], Scenario], team: Team | None) -> Scenario:
    torch.manual_seed(0)
    scenario = make()
    if team:
        scenario.share(team)
    if team and team.rank:
        torch.manual_seed(99)
        team.work()
    else:
        scenario.train()
        if team:
            team.order(Order(end=True))
    return scenario


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    team = form_team("cpu")
    assert team
    for make in SCENARIOS:
        shared = lived(make, team)
        if team.rank == 0:
            save(folder / f"{make.__name__}-shared.npz", shared.outcome())
            save(folder / f"{make.__name__}-alone.npz", lived(make, None).outcome())


def save(path: Path, numbers: Mapping[str, np.ndarray[Any, Any]]) -> None:
    np.savez(path, **numbers)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
