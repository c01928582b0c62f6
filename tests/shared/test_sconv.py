from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ami_shared.models.sconv import LARGEST_NU, SCAN_UP_TO, SConv, _Scan

WIDTH = 32
WAYS = ("scan", "convolve")


def layer(width: int = WIDTH, seed: int = 0) -> SConv:
    torch.manual_seed(seed)
    return SConv(width)


def windows(length: int, batch: int = 2, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    return torch.randn(batch, length, width), torch.randn(batch, width, dtype=torch.complex64)


def slowly(sconv: SConv, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, one step after the other, in complex128."""
    multiplier = torch.exp(-sconv.nu.double().exp()) * torch.exp(1j * sconv.theta.double())
    b = torch.view_as_complex(sconv.b.double())
    state, outputs = hidden.to(torch.complex128), []
    for t in range(x.shape[1]):
        state = multiplier * state + b * x[:, t].double()
        outputs.append(state.real)
    return torch.stack(outputs, dim=1), state


def way_of(sconv: SConv, name: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    way: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = getattr(sconv, name)
    return way


def assert_near(made: Tensor, expected: Tensor, length: int) -> None:
    """Within 1e-5 for short windows, 1e-3 of the largest value for long ones."""
    scale = max(1.0, expected.abs().max().item())
    bound = 1e-5 * scale if length <= 64 else 1e-3 * scale
    assert (made - expected).abs().max() <= bound


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 2, 8, 64, 512, 2048])
def test_every_way_agrees_with_the_definition(way: str, length: int) -> None:
    sconv = layer()
    x, hidden = windows(length)
    expected, last = slowly(sconv, x, hidden)
    y, after = way_of(sconv, way)(x, hidden)
    assert y.shape == x.shape
    assert_near(y, expected, length)
    assert_near(after, last, length)


def test_a_step_is_a_window_of_one() -> None:
    sconv = layer()
    x, hidden = windows(1)
    expected, last = slowly(sconv, x, hidden)
    y, after = sconv(x, hidden)
    assert_near(y, expected, 1)
    assert_near(after, last, 1)


@pytest.mark.parametrize("way", [*WAYS, "step"])
def test_gradients_agree_with_the_definition_s(way: str) -> None:
    length = 1 if way == "step" else 40
    grads = []
    for compute in (way, "slowly"):
        sconv = layer()
        x, hidden = windows(length)
        x.requires_grad_()
        hidden.requires_grad_()
        y, after = slowly(sconv, x, hidden) if compute == "slowly" else way_of(sconv, compute)(x, hidden)
        loss = (y * torch.linspace(-1, 1, WIDTH)).square().sum() + after.real.sum() - 2 * after.imag.sum()
        torch.autograd.backward(loss)
        grads.append([x.grad, hidden.grad, *(p.grad for p in sconv.parameters())])
    for made, expected in zip(*grads, strict=True):
        assert made is not None
        assert expected is not None
        assert (made - expected).abs().max() <= 2e-4 * max(1.0, expected.abs().max().item())


def test_the_scan_s_own_backward_pass_is_right() -> None:
    torch.manual_seed(0)
    multiplier = torch.polar(torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)).requires_grad_()
    driven = torch.randn(5, 2, 3, dtype=torch.complex128, requires_grad=True)
    hidden = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(_Scan.apply, (multiplier, driven, hidden))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "nu", [math.log(1e-7), -20.0, 3.0, 20.0, 50.0], ids=["long memory", "longest", "huge decay", "huger", "hugest"]
)
def test_extreme_memories_stay_finite_and_right(way: str, nu: float) -> None:
    sconv = layer()
    with torch.no_grad():
        sconv.nu.fill_(nu)
    x, hidden = windows(2048 if nu < 0 else 64, batch=1)
    expected, _ = slowly(sconv, x, hidden)
    y, after = way_of(sconv, way)(x, hidden)
    assert_near(y, expected, 2048)
    torch.autograd.backward(y.square().mean() + after.abs().mean())
    for parameter in sconv.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_window_in_two_parts_is_the_whole_window(way: str) -> None:
    sconv = layer()
    x, hidden = windows(30)
    whole, last = way_of(sconv, way)(x, hidden)
    first, between = way_of(sconv, way)(x[:, :11], hidden)
    second, after = way_of(sconv, way)(x[:, 11:], between)
    assert_near(torch.cat([first, second], dim=1), whole, 30)
    assert_near(after, last, 30)


@pytest.mark.parametrize("length", [1, 8, 300])
def test_under_autocast_the_recurrence_stays_in_float32(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCAN_UP_TO, "cpu", 64)  # so that both long and short ways are taken
    sconv = layer()
    x, hidden = windows(length)
    expected, _ = slowly(sconv, x.bfloat16(), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        y, after = sconv(x.bfloat16(), hidden)
    assert y.dtype == torch.bfloat16
    assert after.dtype == torch.complex64
    assert (y.double() - expected).abs().max() <= 0.01 * expected.abs().max()  # the rounding of the output alone


def test_it_begins_with_the_reference_s_distribution() -> None:
    width = 20_000
    torch.manual_seed(0)
    sconv = SConv(width, normalised=False)
    n = torch.randn(width)
    p = torch.polar(n.abs(), 2 * math.pi * torch.arange(width) / width)
    theirs = torch.polar(torch.exp(-p.abs().square()), p.angle())
    ours = sconv.powers(1)[0]
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert ours.abs().quantile(share).item() == pytest.approx(theirs.abs().quantile(share).item(), abs=0.02)
    torch.testing.assert_close(torch.polar(torch.ones(width), sconv.theta), theirs / theirs.abs(), atol=1e-3, rtol=0)
    b = torch.view_as_complex(sconv.b.detach())
    assert b.abs().square().mean().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("kind", ["noise", "constant", "steps"])
@pytest.mark.parametrize("width", [64, 4_096])
def test_in_a_life_without_end_the_state_stays_of_the_size_of_the_input(width: int, kind: str) -> None:
    torch.manual_seed(0)
    ours, theirs = SConv(width), SConv(width, normalised=False)
    torch.testing.assert_close(ours.nu.quantile(0.5), theirs.nu.quantile(0.5), atol=0.6, rtol=0)
    length = 4_000
    x = {
        "noise": torch.randn(1, length, width),
        "constant": torch.ones(1, length, width),
        "steps": torch.randn(1, length // 100, width).repeat_interleave(100, dim=1),
    }[kind]
    with torch.no_grad():
        ends = [sconv(x, torch.zeros(1, width, dtype=torch.complex64))[1].abs() for sconv in (ours, theirs)]
    assert ends[0].square().mean().sqrt() < 2.0
    assert ends[0].max() < 15.0
    if width == 4_096:
        assert ends[1].max() > 100.0, "which is what this is for"


def test_a_draw_of_zero_is_a_long_memory_and_no_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.zeros(*shape))
    sconv = SConv(WIDTH)
    assert torch.isfinite(sconv.nu).all()
    assert sconv.multiplier().abs().min().item() == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=60)
@given(
    nu=st.floats(-30.0, 100.0, width=32),
    theta=st.floats(-50.0, 50.0, width=32),
    length=st.integers(1, 40),
    cut=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_whatever_its_parameters_every_way_is_the_definition(
    nu: float, theta: float, length: int, cut: int, seed: int
) -> None:
    sconv = layer(4, seed)
    with torch.no_grad():
        sconv.nu[0], sconv.theta[0] = nu, theta
    x, hidden = windows(length, width=4)
    expected, last = slowly(sconv, x, hidden)
    for way in (sconv, sconv.scan, sconv.convolve, *([sconv.step] if length == 1 else [])):
        sconv.zero_grad()
        y, after = way(x, hidden)
        assert_near(y, expected, 64)
        assert_near(after, last, 64)
        torch.autograd.backward(y.square().sum() + after.abs().square().sum())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in sconv.parameters())
    if cut < length:
        first, between = sconv(x[:, :cut], hidden)
        second, _ = sconv(x[:, cut:], between)
        assert_near(torch.cat([first, second], dim=1), expected, 64)


@pytest.mark.parametrize("way", [*WAYS, "step"])
@pytest.mark.parametrize("nu", [4.5, 4.55, 4.63], ids=["subnormal", "smaller", "smallest"])
def test_what_is_nearly_forgotten_has_a_finite_gradient(nu: float, way: str) -> None:
    sconv = layer(5)  # an odd width: the end of a row is computed otherwise than what fills a vector register
    with torch.no_grad():
        sconv.nu.fill_(nu)
    assert 0 < math.exp(-math.exp(nu)) < torch.finfo(torch.float32).tiny
    x, hidden = windows(1 if way == "step" else 9, width=5)
    y, after = way_of(sconv, way)(x, hidden)
    torch.autograd.backward(y.square().sum() + after.abs().square().sum())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in sconv.parameters())


@pytest.mark.parametrize("width", [3, 5, 7, 20, 32])
def test_long_windows_have_finite_gradients_at_any_width(width: int) -> None:
    sconv = layer(width)
    with torch.no_grad():
        sconv.nu.fill_(math.log(95.0 / 301))  # the last powers of the window are below 1.2e-38, and not 0
    x, hidden = windows(301, width=width)
    y, after = sconv.convolve(x, hidden)
    torch.autograd.backward(y.square().sum() + after.abs().square().sum())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in sconv.parameters())


@pytest.mark.parametrize("nu", [-20.0, LARGEST_NU, 100.0])
def test_one_step_at_extreme_decay_has_finite_gradients(nu: float) -> None:
    sconv = layer()
    with torch.no_grad():
        sconv.nu.fill_(nu)
    x, hidden = windows(1)
    expected, last = slowly(sconv, x, hidden)
    y, after = sconv.step(x, hidden)
    assert_near(y, expected, 1)
    assert_near(after, last, 1)
    torch.autograd.backward(y.square().sum() + after.abs().sum())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in sconv.parameters())


def test_long_windows_have_the_definition_s_gradients() -> None:
    grads = []
    for compute in (*WAYS, "slowly"):
        sconv = layer(8)
        x, hidden = windows(512, width=8)
        y, after = slowly(sconv, x, hidden) if compute == "slowly" else way_of(sconv, compute)(x, hidden)
        torch.autograd.backward(y.square().mean() + after.abs().square().mean())
        grads.append([p.grad for p in sconv.parameters()])
    *made, expected = grads
    for way in made:
        for ours, theirs in zip(way, expected, strict=True):
            assert ours is not None
            assert theirs is not None
            assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


def test_a_layer_refuses_what_would_broadcast_or_lose_precision() -> None:
    sconv = layer()
    x, hidden = windows(3)
    for odd_x, odd_hidden in (
        (x[0], hidden),
        (x[:, :0], hidden),
        (x[:, :, :1], hidden),
        (x.long(), hidden),
        (x, hidden[:1]),
        (x, hidden[0]),
        (x, hidden.unsqueeze(1)),
        (x, hidden.real),
        (x, hidden.to(torch.complex128)),
    ):
        with pytest.raises(ValueError, match="must be"):
            sconv(odd_x, odd_hidden)
