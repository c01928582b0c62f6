"""What proximal policy optimisation makes of one rollout, beside numbers worked by hand.

The rollout holds an episode that terminated with record 4 and the first records of another one:

    γ = 0.5, λ = 0.8, γλ = 0.4; δ = the reward that came next + γ · the value there − the value here
    step 0: δ = 1 + 0.5 · 2 − 1 = 1            A = 1 − 0.4 · 3.31 = −0.324
    step 1: δ = −2 + 0.5 · 0.5 − 2 = −3.75     A = −3.75 + 0.4 · 1.1 = −3.31
    step 2: δ = 0.5 − 0.5 · 1 − 0.5 = −0.5     A = −0.5 + 0.4 · 4 = 1.1
    step 3: δ = 3 + 0 + 1 = 4                  A = 4
    step 5: δ = 2 + 0.5 · 1.5 − 0.25 = 2.5     A = 2.5 − 0.4 · 0.35 = 2.36
    step 6: δ = −1 − 0.5 · 0.5 − 1.5 = −2.75   A = −2.75 + 0.4 · 6 = −0.35
    step 7: δ = 4 + 0.5 · 3 + 0.5 = 6          A = 6
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from experience import batches, record
from torch import Tensor, nn

from ami_shared.records import Ending
from ami_trainer.data_parallel import Batch, Losses
from ami_trainer.trainers import PPOTrainer

REWARDS = (0.0, 1.0, -2.0, 0.5, 3.0, 0.0, 2.0, -1.0, 4.0)
VALUES = (1.0, 2.0, 0.5, -1.0, 7.0, 0.25, 1.5, -0.5, 3.0)
ACTIONS = (1, 0, 1, 1, 0, 0, 0, 1, 1)
ACTED_WITH = (0.4, 0.5, 0.6, 0.7, 0.8, 0.3, 0.45, 0.55, 0.65)  # probabilities
DISCOUNT, DECAY = 0.5, 0.8
ADVANTAGES = {0: -0.324, 1: -3.31, 2: 1.1, 3: 4.0, 5: 2.36, 6: -0.35, 7: 6.0}
END, LENGTH = 4, 8


class Table(nn.Module):
    """A policy that is nothing but its parameters: logits and value for each record's number."""

    inputs, choices = ("observation",), (2,)

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1, 1, 2 * len(REWARDS)).cos().view(-1, 2))
        self.values = nn.Parameter(torch.linspace(-2, 2, len(REWARDS)))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits[observation], self.values[observation]


class Step(NamedTuple):
    action: int
    log_prob: float
    value: float
    advantage: float
    worth: float


class Watched(PPOTrainer):
    """Remembers its minibatches, record number → what is learned of it."""

    def __init__(self, **options: Any) -> None:
        torch.set_num_threads(1)
        settings = {"discount": DISCOUNT, "gae_decay": DECAY, "epochs": 1, "rollout_length": LENGTH, **options}
        policy: Any = Table()
        super().__init__(policy, **settings)
        self.seen: list[dict[int, Step]] = []

    def _losses(self, batch: Batch) -> Losses:
        actions, *columns, numbers = (part.tolist() for part in batch)
        steps = zip((action for (action,) in actions), *columns, strict=True)
        self.seen.append({number: Step(*step) for number, step in zip(numbers, steps, strict=True)})
        return super()._losses(batch)

    def live(self) -> list[dict[str, float]]:
        """Train on the rollout; return the metrics of each step."""
        records = [
            record(
                n, segment=int(n > END), ending=Ending.TERMINATED if n == END else Ending.NONE,
                observation=np.asarray(n), action=np.array([ACTIONS[n]]), rewarded=np.asarray(n not in (0, END + 1)),
                log_prob=np.asarray(math.log(ACTED_WITH[n]), np.float32), value=np.asarray(VALUES[n], np.float32),
                reward=np.asarray(REWARDS[n], np.float32),
            )
            for n in range(LENGTH + 1)
        ]  # fmt: skip
        for batch in batches(records):
            self.consume(batch, False)
        return [dict(metrics) for metrics in self.train()]


def normalised(numbers: dict[int, float]) -> dict[int, float]:
    mean = sum(numbers.values()) / len(numbers)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers.values()) / len(numbers))
    return {n: (number - mean) / deviation for n, number in numbers.items()}


def test_returns_are_discounted_by_gamma_and_decay_by_lambda() -> None:
    trainer = Watched(batch_size=LENGTH)
    trainer.live()
    (seen,) = trainer.seen
    returns = {n: advantage + VALUES[n] for n, advantage in ADVANTAGES.items()}
    assert {n: step.worth for n, step in seen.items()} == pytest.approx(returns, rel=1e-5)


def test_each_step_keeps_its_own_action_probability_and_value() -> None:
    trainer = Watched(batch_size=3)
    trainer.live()
    seen = dict(chain.from_iterable(batch.items() for batch in trainer.seen))
    assert sorted(seen) == sorted(ADVANTAGES)
    for n, step in seen.items():
        assert (step.action, step.value) == (ACTIONS[n], VALUES[n])
        assert math.exp(step.log_prob) == pytest.approx(ACTED_WITH[n])


def test_advantages_are_normalised_over_the_rollout() -> None:
    trainer = Watched(batch_size=3, normalise_advantages="rollout")
    trainer.live()
    assert sorted(map(len, trainer.seen)) == [3, 4]
    advantages = {n: step.advantage for batch in trainer.seen for n, step in batch.items()}
    assert advantages == pytest.approx(normalised(ADVANTAGES), rel=1e-5)
    assert np.mean(list(advantages.values())) == pytest.approx(0.0, abs=1e-6)
    assert np.std(list(advantages.values())) == pytest.approx(1.0)


def test_advantages_are_normalised_over_each_minibatch_where_that_is_wanted() -> None:
    trainer = Watched(batch_size=3, normalise_advantages="minibatch")
    trainer.live()
    assert sorted(map(len, trainer.seen)) == [3, 4]
    for batch in trainer.seen:
        advantages = {n: step.advantage for n, step in batch.items()}
        assert advantages == pytest.approx(normalised({n: ADVANTAGES[n] for n in batch}), rel=1e-4)
        assert np.mean(list(advantages.values())) == pytest.approx(0.0, abs=1e-6)
        assert np.std(list(advantages.values())) == pytest.approx(1.0)


def gradient(table: Table, value_weight: float) -> dict[str, np.ndarray[Any, Any]]:
    """That of a loss that neither clips nor looks at entropy, by the derivatives of softmax and square."""
    logits, values = table.logits.detach().double().numpy(), table.values.detach().double().numpy()
    of_logits, of_values = np.zeros_like(logits), np.zeros_like(values)
    for n, advantage in normalised(ADVANTAGES).items():
        chances = np.exp(logits[n]) / np.exp(logits[n]).sum()
        ratio = chances[ACTIONS[n]] / ACTED_WITH[n]
        for choice in range(2):
            up = (choice == ACTIONS[n]) - chances[choice]
            of_logits[n, choice] = -advantage * ratio * up / len(ADVANTAGES)
        of_values[n] = value_weight * (values[n] - (ADVANTAGES[n] + VALUES[n])) / len(ADVANTAGES)
    return {"logits": of_logits, "values": of_values}


@pytest.mark.parametrize("max_grad_norm", [None, 1e3, 0.1, 1e-5])
def test_a_gradient_is_clipped_at_its_largest_norm_before_the_first_step_of_adam(max_grad_norm: float | None) -> None:
    rate, epsilon = 1e-2, 1e-5
    trainer = Watched(
        batch_size=LENGTH, clip=100.0, value_weight=0.7, entropy_weight=0.0, weight_decay=0.0, learning_rate=rate,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    wanted = gradient(Table(), value_weight=0.7)
    norm = math.sqrt(sum(float(np.square(part).sum()) for part in wanted.values()))
    assert 0.1 < norm < 1e3
    (metrics,) = trainer.live()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5), "the norm before it is clipped"
    scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
    before, after = dict(Table().named_parameters()), trainer.published_models["policy_value"].named_parameters()
    for name, parameter in after:
        clipped = wanted[name] * scale
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), clipped, rtol=1e-4, atol=1e-6 * scale)
        moved = (parameter - before[name]).detach().numpy()
        np.testing.assert_allclose(moved, -rate * clipped / (np.abs(clipped) + epsilon), rtol=1e-3, atol=1e-6)
