from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ami_inference.agents import RandomHoldingAgent
from ami_inference.sensors.sensor import Observation
from ami_shared.errors import ConfigurationError
from ami_shared.models.replicas import Replicas
from ami_shared.snapshots import Snapshot

SEEN = Observation(np.full((3, 4, 4), 7, np.uint8))


class MeanPixel(nn.Module):
    """An encoder whose embedding can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return observation.float().mean((1, 2, 3)).unsqueeze(1).repeat(1, 2) * self.scale


@pytest.fixture
def replicas() -> Replicas:
    return Replicas({"image_encoder": MeanPixel()})


def actions(agent: RandomHoldingAgent, count: int) -> np.ndarray:
    return np.stack([agent.step(SEEN).action for _ in range(count)])


def test_a_decision_carries_what_trainers_need(replicas: Replicas) -> None:
    decision = RandomHoldingAgent(replicas, (3, 3, 3, 2, 2)).step(SEEN)
    assert decision.action.dtype == np.int64
    assert decision.action.shape == (5,)
    assert sorted(decision.record) == ["action", "embedding", "observation"]
    assert decision.record["observation"] is SEEN.values
    assert decision.record["action"].tolist() == decision.action.tolist()
    embedding = decision.record["embedding"]
    assert (embedding.dtype, embedding.tolist()) == (np.float32, [7.0, 7.0])


def test_it_sees_with_the_replica_in_use(replicas: Replicas) -> None:
    agent = RandomHoldingAgent(replicas, (3,))
    replicas.offer(Snapshot("image_encoder", 1, 0.0, {"scale": np.array([2.0], np.float32)}))
    assert agent.step(SEEN).record["embedding"].tolist() == [7.0, 7.0]
    replicas.swap()
    assert agent.step(SEEN).record["embedding"].tolist() == [14.0, 14.0]


def test_every_choice_is_taken_and_no_other(replicas: Replicas) -> None:
    choices = (3, 3, 3, 2, 2)
    taken = actions(RandomHoldingAgent(replicas, choices, mean_hold_steps=1.0), 300)
    for dimension, count in enumerate(choices):
        values, counts = np.unique(taken[:, dimension], return_counts=True)
        assert values.tolist() == list(range(count))
        assert counts.min() > 0.7 * 300 / count


@pytest.mark.parametrize("mean", [1.0, 4.0, 10.0])
def test_choices_are_held_for_a_geometric_time(replicas: Replicas, mean: float) -> None:
    # So many choices that a new draw is always another one: every change is a draw.
    taken = actions(RandomHoldingAgent(replicas, (1 << 40,) * 50, mean, seed=3), 600)
    changed = taken[1:] != taken[:-1]
    assert changed.mean() == pytest.approx(1 / mean, rel=0.08)
    if mean > 1:  # without memory: after a change the next one is as likely as ever
        after_a_change = changed[1:][changed[:-1]]
        assert after_a_change.mean() == pytest.approx(1 / mean, rel=0.15)


def test_dimensions_change_independently(replicas: Replicas) -> None:
    taken = actions(RandomHoldingAgent(replicas, (1 << 40, 1 << 40), 4.0, seed=1), 4_000)
    first, second = (taken[1:] != taken[:-1]).T
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.0, abs=0.06)


def test_the_seed_decides(replicas: Replicas) -> None:
    runs = [actions(RandomHoldingAgent(replicas, (3, 3, 2), seed=seed), 50) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_actions_already_recorded_do_not_change(replicas: Replicas) -> None:
    agent = RandomHoldingAgent(replicas, (1 << 40,), mean_hold_steps=1.0)
    first = agent.step(SEEN).record["action"]
    kept = first.copy()
    agent.step(SEEN)
    np.testing.assert_array_equal(first, kept)


def test_an_interruption_does_not_let_go(replicas: Replicas) -> None:
    agent = RandomHoldingAgent(replicas, (1 << 40,), mean_hold_steps=1e9)
    before = agent.step(SEEN).action
    agent.begin_segment()
    np.testing.assert_array_equal(agent.step(SEEN).action, before)


@pytest.mark.parametrize("mean", [0.0, 0.99, -1.0, float("nan")])
def test_a_mean_below_one_step_is_a_configuration_error(replicas: Replicas, mean: float) -> None:
    with pytest.raises(ConfigurationError, match="mean_hold_steps"):
        RandomHoldingAgent(replicas, (3,), mean)


class Flat(nn.Linear):
    """An encoder of frames of four by four pixels."""

    def __init__(self) -> None:
        super().__init__(48, 2)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return super().forward(observation.float().flatten(1))


def test_frames_that_the_encoder_does_not_take_are_a_configuration_error() -> None:
    agent = RandomHoldingAgent(Replicas({"image_encoder": Flat()}), (3,))
    with pytest.raises(ConfigurationError, match=r"do not take observations uint8\[3, 5, 5\]"):
        agent.step(Observation(np.zeros((3, 5, 5), np.uint8)))
    agent.step(SEEN)
    with pytest.raises(RuntimeError):
        agent.step(Observation(np.zeros((3, 5, 5), np.uint8)))
