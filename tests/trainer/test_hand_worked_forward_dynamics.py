"""Forward dynamics in a world of whole numbers, in which every prediction can be worked by hand.

A frame shows one number, which is its embedding. Each action adds itself to it, and so does the action before,
which is all that the hidden state remembers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ami_shared.models.replicas import Replicas
from ami_shared.records import Record, RecordBatch
from ami_shared.snapshots import Snapshot
from ami_trainer.trainers import ForwardDynamicsTrainer

ACTIONS = (1, 2, 0, 0, 2, 1, 0, 1, 1, 2, 2, 0)
NUMBERS = (10, 11, 14, 16, 16, 18, 21, 22, 23, 25, 28, 32)  # 11 = 10 + 1, 14 = 11 + 2 + 1, 16 = 14 + 0 + 2 …
SIDE, BRIGHTER = 2, 100


class Reader(nn.Module):
    """An encoder that reads a frame's number."""

    def forward(self, observation: Tensor) -> Tensor:
        return observation[:, :1, 0, 0].float()


class Painter(nn.Module):
    """A decoder that paints numbers, brighter than they were seen."""

    def forward(self, embedding: Tensor) -> Tensor:
        return ((embedding + BRIGHTER) / 255).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)


class Adder(nn.Module):
    """Dynamics that know the world, but for an error that they add to each prediction."""

    choices, hidden_shape = (3,), (1, 1)

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.tensor([error]))

    def forward(self, embeddings: Tensor, hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        means = []
        for t in range(actions.shape[1]):
            means.append(embeddings[:, t] + actions[:, t] + hidden[:, 0].real + self.error)
            hidden = actions[:, t : t + 1].to(torch.complex64)
        return torch.stack(means, dim=1), hidden

    def step(self, embedding: Tensor, hidden: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        means, hidden = self(embedding[:, None], hidden, action[:, None])
        return means[:, 0], hidden


def lived(stale: int = 0) -> RecordBatch:
    """One segment; the hidden states stored with it are so much beside the truth."""
    records = []
    for n, (number, action) in enumerate(zip(NUMBERS, ACTIONS, strict=True)):
        before = ACTIONS[n - 1] if n else 0
        data: dict[str, np.ndarray[Any, Any]] = {
            "observation": np.full((3, SIDE, SIDE), number, np.uint8),
            "hidden": np.full((1, 1), before + stale, np.complex64),
            "action": np.array([action]),
        }
        records.append(Record(0, n, 0.0, 0.0, {}, data))
    return RecordBatch.stack("body", "a", records)


def made(error: float, stale: int = 0, **options: int) -> ForwardDynamicsTrainer:
    """A trainer that has lived, whose followed models have come, and whose dynamics stay as they are."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"window": 4, "burn_in": 0, "batch_size": 5, "first_after": 8, "learning_rate": 0.0}
    dynamics: Any = Adder(error)
    trainer = ForwardDynamicsTrainer(dynamics, Reader(), Painter(), **{**settings, **options})
    replicas = Replicas(trainer.followed_models)
    trainer.follow(replicas)
    for model in trainer.followed_models:
        replicas.offer(Snapshot(model, 1, 0.0, {}))
    trainer.consume(lived(stale), False)
    return trainer


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_no_loss_is_left_but_that_of_the_dynamics_own_error(error: float) -> None:
    losses = [metrics["loss"] for metrics in made(error).train()]
    assert losses == pytest.approx([math.pi * error**2] * 6)


@pytest.mark.parametrize(("burn_in", "squares"), [(0, (7**2 + 0 + 0 + 0) / 4), (1, 0.0)])
def test_a_stale_hidden_state_spoils_the_first_prediction_alone_which_the_burn_in_takes(
    burn_in: int, squares: float
) -> None:
    losses = [metrics["loss"] for metrics in made(0.0, stale=7, burn_in=burn_in).train()]
    assert losses == pytest.approx([math.pi * squares] * 6)


def test_fresh_windows_lie_side_by_side_and_saying_that_nothing_changes_costs_the_squares_of_the_changes() -> None:
    metrics = list(made(0.5, window=3, burn_in=1).train())
    assert metrics[0]["fresh_loss"] == pytest.approx(math.pi / 4)
    changes = [14 - 11, 16 - 14, 21 - 18, 22 - 21, 28 - 25, 32 - 28]
    assert metrics[0]["fresh_loss_of_no_change"] == pytest.approx(math.pi * sum(c**2 for c in changes) / 6)


def test_the_picture_shows_what_was_seen_reconstructed_predicted_and_dreamt() -> None:
    trainer = made(3.0)
    assert trainer.picture() is None, "no decoder is in use yet"
    list(trainer.train())
    picture = trainer.picture()
    assert picture is not None
    seen = np.array([16, 18, 21, 22, 23, 25, 28, 32])
    predicted = seen + 3
    dreamt = seen + 3 * np.array([1, 1, 1, 2, 3, 4, 5, 6])  # each dream adds the error once more
    rows = np.stack([seen, BRIGHTER + seen, BRIGHTER + predicted, BRIGHTER + dreamt])
    assert picture.pixels[::SIDE, ::SIDE, 0].tolist() == rows.tolist()
    expected = rows.repeat(SIDE, axis=0).repeat(SIDE, axis=1)
    assert np.array_equal(picture.pixels, np.stack([expected] * 3, axis=2))
