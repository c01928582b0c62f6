"""SConv forward and backward at several lengths, beside the FFT form of the reference in the same run; then acting.

The ways are timed in turns, so that other load falls on all of them alike; medians, and the median of the ratios.

    python benchmarks/sconv_speed.py [--width 512] [--threads 1] [--repeats 15] [--device cpu]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ami_shared.models.dynamics import ForwardDynamics
from ami_shared.models.sconv import SConv

BATCHES = {1: 16, 8: 16, 64: 16, 512: 4, 2048: 4}
WARM_UP = 2
ACTING_STEPS = 300
CHOICES = (3, 3, 3, 2, 2)
Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{os.cpu_count()} cores, {arguments.threads} threads, {arguments.device}, width {arguments.width}")
    print("ms, forward and backward; ours is what the layer picks; load is the 1-minute average before the row")
    columns = ("ours", "scan", "convolve", "reference")
    print(
        f"{'length':>6} {'batch':>5} {'load':>5} | "
        + " ".join(f"{c:>9}" for c in columns)
        + f" | {'reference/ours':>14}"
    )
    layer = SConv(arguments.width).to(arguments.device)
    for length, batch in BATCHES.items():
        print_row(layer, length, batch, arguments.repeats)
    print_acting(arguments.device)


def print_row(layer: SConv, length: int, batch: int, repeats: int) -> None:
    """Measure and print one length."""
    load, device, width = os.getloadavg()[0], layer.nu.device, len(layer.nu)
    x = torch.randn(batch, length, width, device=device, requires_grad=True)
    hidden = torch.randn(batch, width, dtype=torch.complex64, device=device)
    ways: tuple[Way, ...] = (layer, layer.scan, layer.convolve, lambda x, hidden: by_complex_fft(layer, x, hidden))
    rounds = [[timed(way, x, hidden) for way in ways] for _ in range(WARM_UP + repeats)][WARM_UP:]
    ratio = statistics.median(times[-1] / times[0] for times in rounds)
    told = " ".join(f"{statistics.median(column):9.2f}" for column in zip(*rounds, strict=True))
    print(f"{length:6} {batch:5} {load:5.2f} | {told} | {ratio:14.1f}", flush=True)


def by_complex_fft(layer: SConv, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's form: complex FFTs of kernel and input, twice as long as the window."""
    length = x.shape[1]
    log = torch.log(torch.polar(torch.exp(-layer.nu.exp()), layer.theta))
    steps = torch.arange(length, device=x.device).unsqueeze(1)
    kernel = torch.exp(steps * log) * torch.view_as_complex(layer.b)
    spectrum = torch.fft.fft(kernel, 2 * length, dim=0) * torch.fft.fft(x.to(torch.complex64), 2 * length, dim=1)
    states = torch.fft.ifft(spectrum, dim=1)[:, :length] + torch.exp((steps + 1) * log) * hidden.unsqueeze(1)
    return states.real, states[:, -1]


def timed(way: Way, x: Tensor, hidden: Tensor) -> float:
    """Milliseconds of one forward and backward pass."""
    settle(x.device)
    begin = time.perf_counter()
    y, after = way(x, hidden)
    torch.autograd.backward(y.sum() + after.real.sum())
    settle(x.device)
    return (time.perf_counter() - begin) * 1e3


def settle(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_acting(device: str) -> None:
    """One step of the forward dynamics at reference size, batch 1, beside its linear layers alone."""
    dynamics = ForwardDynamics(512, CHOICES).to(device).eval()
    linears = [part for part in dynamics.modules() if isinstance(part, torch.nn.Linear)]
    inputs = [torch.randn(1, linear.in_features, device=device) for linear in linears]
    embedding, hidden = torch.randn(1, 512, device=device), dynamics.initial_hidden(1)
    action = torch.zeros(1, len(CHOICES), dtype=torch.int64, device=device)
    times = []
    with torch.inference_mode():
        for _ in range(20 + ACTING_STEPS):
            begin = time.perf_counter()
            dynamics.step(embedding, hidden, action)
            settle(embedding.device)
            middle = time.perf_counter()
            for linear, x in zip(linears, inputs, strict=True):
                linear(x)
            settle(embedding.device)
            times.append(((middle - begin) * 1e3, (time.perf_counter() - middle) * 1e3))
    step, alone = (sorted(column) for column in zip(*times[20:], strict=True))
    p50, p99 = step[len(step) // 2], step[len(step) * 99 // 100]
    print(f"acting, one step of the reference size: p50 {p50:.2f} ms, p99 {p99:.2f} ms", end="; ")
    print(f"its {len(linears)} linear layers alone: p50 {alone[len(alone) // 2]:.2f} ms; load {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
