"""SConv forward and backward at several lengths, beside the FFT form of the reference in the same run.

python benchmarks/sconv_speed.py [--width 512] [--threads 1] [--repeats 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ami_shared.models.sconv import SConv

BATCHES = {1: 16, 8: 16, 64: 16, 512: 4, 2048: 4}
Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    layer = SConv(arguments.width)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {arguments.threads} threads, width {arguments.width}"
    )
    print(f"{'length':>6} {'batch':>5} | {'scan':>8} {'convolve':>8} {'reference':>9}   ms, forward and backward")
    for length, batch in BATCHES.items():
        x = torch.randn(batch, length, arguments.width, requires_grad=True)
        hidden = torch.randn(batch, arguments.width, dtype=torch.complex64)
        ways: dict[str, Way] = {
            "scan": layer.step if length == 1 else layer.scan,
            "convolve": layer.convolve,
            "reference": lambda x, hidden: by_complex_fft(layer, x, hidden),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, way in ways.items():
                times[name].append(timed(way, x, hidden))
        scan, convolve, reference = (statistics.median(column[1:]) for column in times.values())
        told = f"{length:>6} {batch:>5} | {scan:>8.2f} {convolve:>8.2f} {reference:>9.2f}"
        print(f"{told}   reference/scan {reference / scan:.1f}", flush=True)  # a CPU takes the scan at every length


def by_complex_fft(layer: SConv, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's form: complex FFTs of kernel and input, twice as long as the window."""
    length = x.shape[1]
    log = torch.log(torch.polar(torch.exp(-layer.nu.exp()), layer.theta))
    steps = torch.arange(length).unsqueeze(1)
    kernel = torch.exp(steps * log) * torch.view_as_complex(layer.b)
    spectrum = torch.fft.fft(kernel, 2 * length, dim=0) * torch.fft.fft(x.to(torch.complex64), 2 * length, dim=1)
    states = torch.fft.ifft(spectrum, dim=1)[:, :length] + torch.exp((steps + 1) * log) * hidden.unsqueeze(1)
    return states.real, states[:, -1]


def timed(way: Way, x: Tensor, hidden: Tensor) -> float:
    """Milliseconds of one forward and backward pass."""
    begin = time.perf_counter()
    y, after = way(x, hidden)
    torch.autograd.backward(y.sum() + after.real.sum())
    return (time.perf_counter() - begin) * 1e3


if __name__ == "__main__":
    main()
