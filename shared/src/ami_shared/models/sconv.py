"""SConv: a diagonal complex recurrence with one state for each channel, computed in three ways.

    h_t = A h_{t-1} + b x_t        y_t = Re h_t

Magnitude and phase of A are parameters of their own, |A| = exp(−exp(ν)) and arg A = θ, as in the Linear Recurrent
Unit (Orvieto et al. 2023): A stays inside the unit circle, and no gradient grows without bound.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_DECAY = 1e-8  # of −log|A| at the start; n² may come out as 0, whose logarithm does not exist
LARGEST_NU = 20.0  # beyond it A is 0 in any case, and exp(ν) would overflow
# Longer windows are faster by FFT. On one core none is: the scan takes a third of its time at L = 8 to 2048
# (benchmarks/sconv_speed.py). On a GPU each step of the scan is a kernel to launch.
SCAN_UP_TO = {"cpu": 1 << 30, "cuda": 32}


class SConv(nn.Module):
    """One recurrence for each of `width` channels, always in float32: complex numbers have no half precision."""

    def __init__(self, width: int, normalised: bool = True) -> None:
        """Begin as the reference: A = e^(−|p|²) e^(i arg p) with p = e^(2πi d/D)·|n|, n ~ N(0, 1); b complex normal.

        Args:
            width: W, the number of channels.
            normalised: scale b down initially, so that every channel's state is as large as its input: by √(1 − |A|²),
                as in the Linear Recurrent Unit, which is right for noise, or by |1 − A| if that is less, which is right
                for constant input. The reference's state grows for as long as the channel remembers: without episodes,
                to a thousand times its input, and more with more channels.
        """
        super().__init__()
        decay = torch.randn(width).square().clamp_min(SMALLEST_DECAY)
        self.nu = nn.Parameter(decay.log())
        self.theta = nn.Parameter(2 * math.pi * torch.arange(width) / width)
        self.b = nn.Parameter(torch.randn(width, 2) / math.sqrt(2.0))
        if normalised:
            with torch.no_grad():
                noise, constant = (-torch.expm1(-2 * decay)).sqrt(), (1 - self.multiplier()).abs()
                self.b.mul_(torch.minimum(noise, constant).unsqueeze(1))

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (B, L, W), of the dtype of x, and the state (B, W) complex64 after the last step.

        Args:
            x: (B, L, W), real.
            hidden: (B, W) complex64, the state before the first step.
        """
        self._check(x, hidden)
        if x.shape[1] == 1:  # element by element: autocast would change nothing, and to switch it off takes time
            y, after = self.step(x.float(), hidden)
            return y.to(x.dtype), after
        with torch.autocast(x.device.type, enabled=False):
            way = self.scan if x.shape[1] <= SCAN_UP_TO.get(x.device.type, 32) else self.convolve
            y, after = way(x.float(), hidden)
        return y.to(x.dtype), after

    def step(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Compute one step, as acting needs it: x (B, 1, W), hidden (B, W) complex64."""
        after = self.multiplier() * hidden + torch.view_as_complex(self.b) * x[:, 0]
        return after.real.unsqueeze(1), after

    def scan(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Compute step by step, with a backward pass that runs the recurrence in reverse."""
        driven = torch.view_as_complex(self.b) * x.transpose(0, 1)
        states: Tensor = _Scan.apply(self.multiplier(), driven, hidden)  # type: ignore[no-untyped-call]
        return states.real.transpose(0, 1), states[-1]

    def convolve(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve with the impulse response by FFTs of length 2L, long enough not to wrap round."""
        length = x.shape[1]
        powers = self.powers(length)
        b = torch.view_as_complex(self.b)
        response = torch.cat([b.unsqueeze(0), powers[:-1] * b])  # (L, W): what is left of an input after k steps
        spectrum = torch.fft.rfft(response.real.T, 2 * length) * torch.fft.rfft(x.transpose(1, 2), 2 * length)
        driven = torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2)
        free = powers * hidden.unsqueeze(1)
        weights = response.flip(0)
        real, imaginary = (torch.einsum("lw,blw->bw", part, x) for part in (weights.real, weights.imag))
        return driven + free.real, free[:, -1] + torch.complex(real, imaginary)

    def multiplier(self) -> Tensor:
        """Return A, (W,) complex64. Not by torch.polar, whose gradient is NaN at magnitudes below 1.2e-38 but not 0."""
        return torch.exp(torch.complex(-self._decay(), self.theta))

    def powers(self, count: int) -> Tensor:
        """Return A^1 … A^count, (count, W) complex64. Angles are reduced in float64: k θ grows far beyond 2π."""
        steps = torch.arange(1, count + 1, device=self.nu.device).unsqueeze(1)
        angles = torch.remainder(steps.double() * self.theta.double(), 2 * math.pi).float()
        return torch.exp(torch.complex(-steps * self._decay(), angles))

    def _decay(self) -> Tensor:
        """Return −log|A|, (W,)."""
        return self.nu.clamp(max=LARGEST_NU).exp()

    def _check(self, x: Tensor, hidden: Tensor) -> None:
        width = len(self.nu)
        if x.ndim != 3 or x.shape[2] != width or x.shape[1] == 0 or not x.is_floating_point():
            raise ValueError(f"x {x.dtype} {tuple(x.shape)} must be real (B, L, {width}), L at least 1")
        if hidden.shape != (x.shape[0], width) or hidden.dtype != torch.complex64:
            raise ValueError(f"hidden {hidden.dtype} {tuple(hidden.shape)} must be complex64 ({x.shape[0]}, {width})")


class _Scan(torch.autograd.Function):
    """h_t = A h_{t-1} + u_t for A (W), u (L, B, W), h_0 (B, W), all complex64. Plain autograd costs 4 times that."""

    @staticmethod
    def forward(ctx: Any, multiplier: Tensor, driven: Tensor, hidden: Tensor) -> Tensor:
        states = torch.empty_like(driven)
        before = hidden
        for driven_t, state in zip(driven, states, strict=True):
            before = torch.addcmul(driven_t, multiplier, before, out=state)
        ctx.save_for_backward(multiplier, hidden, states)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        multiplier, hidden, states = ctx.saved_tensors
        conjugate = multiplier.conj().resolve_conj()
        flowing = torch.empty_like(states)
        later = torch.zeros_like(hidden)
        for gradient, flow in zip(gradients[0].flip(0), flowing, strict=True):
            later = torch.addcmul(gradient, conjugate, later, out=flow)
        flowing = flowing.flip(0)
        before = torch.cat([hidden.unsqueeze(0), states[:-1]])
        return (flowing * before.conj()).sum((0, 1)), flowing, conjugate * later
