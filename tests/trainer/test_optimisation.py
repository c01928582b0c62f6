from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from ami_trainer.optimisation import KEEP_EVERY, GuardedOptimiser, fused_if_possible


class Bench:
    """A guarded optimiser of a small network with batch norm."""

    def __init__(self, clip_norm: float | None = None, patience: int = 3, rate: float = 0.01) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.adam = torch.optim.Adam(self.net.parameters(), rate, fused=fused_if_possible(self.net))
        self.guard = GuardedOptimiser({"net": self.net}, self.adam, clip_norm, patience)

    def loss(self, fill: float = 1.0) -> Tensor:
        loss: Tensor = self.net(fill * torch.randn(8, 2)).square().mean()
        return loss

    def step(self, loss: Tensor) -> dict[str, float]:
        return self.guard.step_on((), lambda _: {"loss": loss})

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_fused_form_steps_as_the_plain_one() -> None:
    nets = [nn.Linear(7, 5) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    plain = torch.optim.AdamW(nets[0].parameters(), 0.01, fused=False)
    fused = torch.optim.AdamW(nets[1].parameters(), 0.01, fused=fused_if_possible(nets[1]))
    assert fused.defaults["fused"]
    for _ in range(50):
        x = torch.randn(8, 7)
        for net, adam in zip(nets, (plain, fused), strict=True):
            adam.zero_grad()
            net(x).square().mean().backward()
            adam.step()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.complex64)])
def test_adam_is_not_fused_where_torch_may_be_unable_to(device: str, dtype: torch.dtype) -> None:
    module = nn.ParameterList([nn.Parameter(torch.zeros(3, device=device, dtype=dtype))])
    assert fused_if_possible(module) is None
    assert fused_if_possible(nn.Linear(2, 2), module) is None


class NaNGradient(torch.autograd.Function):
    """A finite value with a gradient that is none."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def test_a_finite_loss_makes_a_step_and_tells_the_norm_of_its_gradient() -> None:
    bench = Bench()
    before = bench.state()
    loss = bench.loss()
    told = bench.step(loss)
    norms = [p.grad.norm() for p in bench.net.parameters() if p.grad is not None]
    norm = pytest.approx(torch.stack(norms).norm().item())
    assert told == {"loss": loss.item(), "grad_norm": norm, "skipped": 0.0}
    assert not same(before, bench.state())
    assert (bench.guard.steps, bench.guard.skipped) == (1, 0)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_leaves_no_trace(factor: float) -> None:
    bench = Bench()
    for _ in range(5):
        bench.step(bench.loss())
    before = bench.state()
    told = bench.step(bench.loss() * factor)
    assert told["skipped"] == 1.0
    assert "grad_norm" not in told
    assert same(before, bench.state())
    assert bench.guard.statistics() == {"skipped": 1, "restored": 0}


def test_batch_norm_that_saw_something_not_finite_forgets_it_and_nothing_else() -> None:
    bench = Bench()
    for _ in range(5):
        bench.step(bench.loss())
    before = bench.state()
    bench.step(bench.loss(fill=float("nan")))
    assert same(before, bench.state())
    assert before["1.num_batches_tracked"] == 5


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    bench = Bench()
    bench.step(bench.loss())
    before = bench.state()
    assert bench.step(NaNGradient.apply(bench.loss()))["skipped"] == 1.0
    assert same(before, bench.state())
    assert bench.step(bench.loss())["skipped"] == 0.0
    assert (bench.guard.steps, bench.guard.skipped) == (2, 1)


def test_after_so_many_in_a_row_the_last_good_parameters_come_back(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(patience=3)
    for _ in range(KEEP_EVERY):
        bench.step(bench.loss())
    good = bench.state()
    for _ in range(5):
        bench.step(bench.loss())
    with torch.no_grad():
        bench.net[0].weight[0, 0] = float("nan")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bench.step(bench.loss())
    assert same(good, bench.state())
    assert not bench.adam.state, "its moments stem from what led astray"
    assert bench.guard.statistics() == {"skipped": 3, "restored": 1}
    assert len(caplog.messages) == 2, "once for the skipping, once for the way back"
    assert bench.step(bench.loss())["skipped"] == 0.0
    assert not same(good, bench.state()), "training goes on"


def test_steps_in_between_begin_the_count_anew() -> None:
    bench = Bench(patience=3)
    for factor in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        bench.step(bench.loss() * factor)
    assert bench.guard.statistics() == {"skipped": 4, "restored": 0}


def test_poisoned_parameters_are_never_kept_as_good() -> None:
    bench = Bench(patience=2)
    first = bench.state()
    for _ in range(KEEP_EVERY - 1):
        bench.step(bench.loss())
    unused = nn.Parameter(torch.tensor([float("inf")]))
    bench.net.register_parameter("unused", unused)
    bench.step(bench.loss())
    with torch.no_grad():
        bench.net[0].weight.fill_(float("nan"))
    for _ in range(2):
        bench.step(bench.loss())
    assert same(first, bench.state())


def test_a_buffer_that_is_not_finite_though_losses_are_is_healed(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.step(bench.loss())
    good = bench.net[1].running_var.clone()
    for n in range(2 * KEEP_EVERY - 1):
        if n == KEEP_EVERY:
            bench.net[1].running_var.fill_(float("inf"))
        bench.step(bench.loss())
    assert (bench.guard.skipped, bench.guard.restored) == (0, 1)
    assert torch.isfinite(bench.net[1].running_var).all()
    assert not torch.equal(bench.net[1].running_var, good), "those of the last good moment, not of the first"
    assert "parameters or buffers are not finite: restored" in caplog.text


def test_gradients_are_clipped_at_the_norm_given() -> None:
    told = {}
    for clip_norm in (None, 0.1, 1e9):
        bench = Bench(clip_norm)
        norm = bench.step(100 * bench.loss())["grad_norm"]
        applied = torch.stack([p.grad.norm() for p in bench.net.parameters() if p.grad is not None]).norm().item()
        told[clip_norm] = (norm, applied)
    assert told[0.1][1] == pytest.approx(0.1, rel=1e-3)
    assert told[0.1][0] == told[None][0] == pytest.approx(told[None][1]), "told is the norm before clipping"
    assert told[1e9] == told[None]


def test_what_was_filled_from_outside_is_the_good_moment_to_go_back_to() -> None:
    bench, other = Bench(patience=1), Bench()
    with torch.no_grad():
        other.net[0].weight.fill_(0.25)
    bench.net.load_state_dict(other.net.state_dict())
    filled = bench.state()
    with torch.no_grad():
        bench.net[0].weight.fill_(float("nan"))
    bench.step(bench.loss())
    assert same(filled, bench.state())


def test_the_last_good_parameters_are_kept_in_the_memory_of_those_before() -> None:
    bench = Bench()
    places = {key: tensor.data_ptr() for key, tensor in bench.guard._good["net"].items()}
    for _ in range(KEEP_EVERY):
        bench.step(bench.loss())
    bench.net.load_state_dict(bench.state())
    assert {key: tensor.data_ptr() for key, tensor in bench.guard._good["net"].items()} == places
    assert same(bench.guard._good["net"], bench.state())
