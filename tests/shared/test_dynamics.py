from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ami_shared.models.dynamics import ForwardDynamics, decay_groups, negative_log_density
from ami_shared.models.parameters import read_arrays, write_arrays
from ami_shared.models.sconv import SConv

CHOICES = (3, 3, 3, 2, 2)


def tiny(dropout: float = 0.1) -> ForwardDynamics:
    torch.manual_seed(0)
    return ForwardDynamics(12, CHOICES, width=16, depth=3, feedforward=24, action_width=4, dropout=dropout)


def life(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    actions = torch.stack([torch.randint(0, n, (batch, length)) for n in CHOICES], dim=-1)
    return torch.randn(batch, length, 12), torch.randn(batch, 3, 16, dtype=torch.complex64), actions


def test_one_step_after_the_other_is_the_window() -> None:
    dynamics = tiny().eval()
    embeddings, hidden, actions = life(9)
    means, after = dynamics(embeddings, hidden, actions)
    assert means.shape == embeddings.shape
    state = hidden
    for t in range(9):
        mean, state = dynamics.step(embeddings[:, t], state, actions[:, t])
        torch.testing.assert_close(mean, means[:, t], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, after, atol=1e-4, rtol=1e-4)


def test_what_is_done_and_what_is_remembered_matter() -> None:
    dynamics = tiny().eval()
    embeddings, hidden, actions = life(1, batch=1)
    mean, _ = dynamics(embeddings, hidden, actions)
    for dimension in range(len(CHOICES)):
        other = actions.clone()
        other[..., dimension] = (other[..., dimension] + 1) % CHOICES[dimension]
        assert not torch.allclose(dynamics(embeddings, hidden, other)[0], mean)
    assert not torch.allclose(dynamics(embeddings, dynamics.initial_hidden(1), actions)[0], mean)


def test_nothing_is_remembered_at_first() -> None:
    hidden = tiny().initial_hidden(2)
    assert hidden.shape == (2, 3, 16)
    assert hidden.dtype == torch.complex64
    assert not hidden.abs().any()


def test_minus_log_p_is_pi_times_the_squared_error() -> None:
    mean, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]])
    density = torch.distributions.Normal(mean, 1 / math.sqrt(2 * math.pi))
    torch.testing.assert_close(negative_log_density(mean, target), -density.log_prob(target), atol=1e-6, rtol=0)
    assert negative_log_density(mean, target)[0, 0].item() == pytest.approx(math.pi * 0.25)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="against"):
        negative_log_density(torch.zeros(4), torch.zeros(4, 1))
    dynamics = tiny()
    embeddings, hidden, actions = life(5)
    for odd in (
        (embeddings[:, :, :11], hidden, actions),
        (embeddings, hidden[:1], actions),
        (embeddings, hidden, actions[:, :4]),
        (embeddings, hidden, actions[:, :, :4]),
    ):
        with pytest.raises(ValueError, match="must be"):
            dynamics(*odd)


def test_weight_decay_is_for_matrices_alone() -> None:
    dynamics = tiny()
    matrices, others = decay_groups(dynamics, 0.5)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    recurrent = [p for part in dynamics.modules() if isinstance(part, SConv) for p in part.parameters()]
    assert len(recurrent) == 9
    kept = {id(p) for p in others["params"]}
    assert all(id(p) in kept for p in recurrent)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(dynamics.parameters()))


def test_its_state_is_plain_float32_and_travels() -> None:
    one, other = tiny(), ForwardDynamics(12, CHOICES, 16, 3, 24, 4)
    arrays = read_arrays(one)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    write_arrays(other, arrays)
    embeddings, hidden, actions = life(4)
    torch.testing.assert_close(one.eval()(embeddings, hidden, actions)[0], other.eval()(embeddings, hidden, actions)[0])


def test_it_learns_a_world_that_turns() -> None:
    torch.manual_seed(0)
    dynamics = ForwardDynamics(2, (3,), width=32, depth=2, feedforward=32, dropout=0.0)
    optimiser = torch.optim.AdamW(decay_groups(dynamics, 0.0), lr=3e-3)
    losses = []
    for _ in range(150):
        actions = torch.randint(0, 3, (16, 20, 1))
        angles = torch.cumsum((actions[..., 0] - 1) * 0.5, dim=1)
        angles = torch.cat([torch.zeros(16, 1), angles], dim=1)
        places = torch.stack([angles.cos(), angles.sin()], dim=-1)
        means, _ = dynamics(places[:, :-1], dynamics.initial_hidden(16), actions)
        loss = negative_log_density(means, places[:, 1:]).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(loss.item())
    still = negative_log_density(places[:, :-1], places[:, 1:]).mean().item()
    assert losses[-1] < 0.1 * still


def test_numbers_of_the_wrong_kind_are_refused_by_name() -> None:
    dynamics = tiny()
    embeddings, hidden, actions = life(5)
    for odd, name in (
        ((embeddings.long(), hidden, actions), "embeddings int64"),
        ((embeddings[0], hidden, actions), "embeddings float32"),
        ((embeddings[:, :0], hidden, actions[:, :0]), "embeddings float32"),
        ((embeddings, hidden.real, actions), "hidden float32"),
        ((embeddings, hidden.to(torch.complex128), actions), "hidden complex128"),
        ((embeddings, hidden, actions.float()), "actions float32"),
        ((embeddings, hidden, actions.int()), "actions int32"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* must be"):
            dynamics(*odd)
    with pytest.raises(ValueError, match="must be"):
        dynamics.step(embeddings[0, 0], hidden, actions[:, 0])


def test_a_window_in_two_parts_is_the_whole_window() -> None:
    dynamics = tiny().eval()
    embeddings, hidden, actions = life(20)
    means, last = dynamics(embeddings, hidden, actions)
    first, between = dynamics(embeddings[:, :7], hidden, actions[:, :7])
    second, after = dynamics(embeddings[:, 7:], between, actions[:, 7:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), means, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, last, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 30])
def test_it_trains_under_autocast_with_its_memory_in_float32(length: int) -> None:
    dynamics = tiny(dropout=0.0)
    embeddings, hidden, actions = life(length)
    expected, last = dynamics(embeddings, hidden, actions)
    with torch.autocast("cpu", torch.bfloat16):
        means, after = dynamics(embeddings, hidden, actions)
    assert after.dtype == torch.complex64
    assert (means.float() - expected).abs().max() <= 0.1 * expected.abs().max()
    assert (after - last).abs().max() <= 0.1 * last.abs().max()
    torch.autograd.backward(negative_log_density(means.float(), embeddings).mean())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in dynamics.parameters())


def test_what_is_not_decayed_is_named_as_such() -> None:
    dynamics = tiny()
    matrices, others = decay_groups(dynamics, 0.5)
    names = {id(p): name for name, p in dynamics.named_parameters()}
    kept = {names[id(p)] for p in others["params"]}
    assert {name for name in names.values() if name.endswith((".nu", ".theta", ".b", ".bias"))} <= kept
    assert {name for name in names.values() if "_norm." in name} <= kept
    decayed = {names[id(p)] for p in matrices["params"]}
    assert {"inward.weight", "outward.weight", "blocks.0.gate.weight", "actions.0.weight"} <= decayed
    assert not kept & decayed


def test_each_block_has_two_norms_of_its_own() -> None:
    block = tiny().blocks[0]
    assert block.recurrence_norm.weight is not block.feedforward_norm.weight


def test_the_reference_size_is_the_published_one() -> None:
    with torch.device("meta"):
        dynamics = ForwardDynamics(512, CHOICES)
    assert dynamics.hidden_shape == (4, 512)
    assert dynamics.inward.in_features == 552
    assert [table.num_embeddings for table in dynamics.actions] == list(CHOICES)
