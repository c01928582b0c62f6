from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ami_shared.models.parameters import read_arrays, write_arrays
from ami_shared.models.policy_value import (
    ImageTrunk,
    MemoryTrunk,
    MultiCategorical,
    PolicyValueCommonNet,
    SeparateTrunks,
    Trunk,
    VectorTrunk,
)

CHOICES = (3, 2, 4)


def logits_and_actions(batch: int = 50) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    actions = torch.stack([torch.randint(0, n, (batch,)) for n in CHOICES], dim=1)
    return torch.randn(batch, sum(CHOICES)) * 3, actions


def test_the_joint_distribution_is_that_of_independent_categoricals() -> None:
    logits, actions = logits_and_actions()
    made = MultiCategorical(logits, CHOICES)
    parts = [torch.distributions.Categorical(logits=part) for part in logits.split(CHOICES, dim=1)]
    expected = torch.stack([part.log_prob(actions[:, i]) for i, part in enumerate(parts)], dim=1)
    torch.testing.assert_close(made.log_probs(actions), expected)
    torch.testing.assert_close(made.log_prob(actions), expected.sum(dim=1))
    torch.testing.assert_close(made.entropy(), sum(part.entropy() for part in parts))


def test_shapes_that_would_broadcast_are_refused() -> None:
    logits, actions = logits_and_actions()
    with pytest.raises(ValueError, match="logits"):
        MultiCategorical(logits[:, :-1], CHOICES)
    for odd in (actions[:, :2], actions[:1], actions[:, 0]):
        with pytest.raises(ValueError, match="actions"):
            MultiCategorical(logits, CHOICES).log_probs(odd)


TRUNKS: dict[str, tuple[Trunk, list[Tensor]]] = {
    "image": (ImageTrunk(84, 84, [8, 16, 16], 32), [torch.randint(0, 256, (2, 3, 84, 84), dtype=torch.uint8)]),
    "vector": (VectorTrunk(4, 32), [torch.randn(2, 4)]),
    "memory": (MemoryTrunk(12, (3, 8), 32), [torch.randn(2, 12), torch.randn(2, 3, 8, dtype=torch.complex64)]),
    "separate": (SeparateTrunks(VectorTrunk(4, 32), VectorTrunk(4, 16)), [torch.randn(2, 4)]),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_every_trunk_carries_policy_and_value(name: str) -> None:
    trunk, inputs = TRUNKS[name]
    net = PolicyValueCommonNet(trunk, CHOICES)
    logits, values = net(*inputs)
    assert logits.shape == (2, sum(CHOICES))
    assert values.shape == (2,)
    assert len(net.inputs) == len(inputs)
    other = PolicyValueCommonNet(trunk, CHOICES)
    write_arrays(other, read_arrays(net))
    torch.testing.assert_close(other(*inputs)[0], logits)


def test_policy_and_value_of_separate_trunks_share_nothing() -> None:
    net = PolicyValueCommonNet(SeparateTrunks(VectorTrunk(4, 8), VectorTrunk(4, 8)), CHOICES)
    torch.autograd.backward(net(torch.randn(2, 4))[1].sum())
    assert all(p.grad is None for p in net.trunk.policy.parameters())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="same"):
        SeparateTrunks(VectorTrunk(4), MemoryTrunk(4, (1, 2)))


def test_what_is_remembered_matters_to_the_memory_trunk() -> None:
    trunk, (embedding, hidden) = TRUNKS["memory"]
    assert not torch.allclose(trunk(embedding, hidden), trunk(embedding, hidden * 1j))


def test_images_are_taken_as_uint8_alone() -> None:
    with pytest.raises(TypeError, match="uint8"):
        TRUNKS["image"][0](torch.rand(1, 3, 84, 84))


def test_what_was_decided_is_not_rounded_under_autocast() -> None:
    """Values far from 0 would all become the same few numbers, and ratios of probabilities differ from 1."""
    policy = PolicyValueCommonNet(VectorTrunk(4, 32), [5, 3])
    nn.init.constant_(policy.value_head.bias, 50.0)
    seen = torch.randn(256, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, values = policy(seen)
    assert (logits.dtype, values.dtype) == (torch.float32, torch.float32)
    assert len(values.unique()) > 200


def test_the_initialisation_is_orthogonal_with_the_gains_of_ppo() -> None:
    torch.manual_seed(0)
    net = PolicyValueCommonNet(VectorTrunk(64, 64), CHOICES)
    linear = next(part for part in net.trunk.modules() if isinstance(part, nn.Linear))
    torch.testing.assert_close(linear.weight @ linear.weight.T, 2.0 * torch.eye(64), atol=1e-4, rtol=0)
    heads = (net.policy_head.weight, 0.01), (net.value_head.weight, 1.0)
    for weight, gain in heads:
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-4, rtol=0)
    assert net.policy_head.bias is None
    entropy = MultiCategorical(net(torch.randn(8, 64))[0], CHOICES).entropy()
    assert entropy.mean().item() == pytest.approx(math.log(np.prod(CHOICES)), abs=1e-3)
