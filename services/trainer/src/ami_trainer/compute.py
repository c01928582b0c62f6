"""Where and with what precision a trainer computes: device, automatic mixed precision, compilation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ami_shared.errors import ConfigurationError
from ami_shared.models.device import usable_device
from ami_shared.wire import Array

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
T = TypeVar("T")

PRECISIONS = ("float32", "bfloat16")


class Compute:
    """One device and its precision."""

    def __init__(self, device: str = "cpu", precision: str = "float32", compile: bool = False) -> None:
        """Check the settings; nothing is moved yet.

        Args:
            device: cpu, cuda, cuda:1 …
            precision: float32, or bfloat16: matrix products in bfloat16 by autocast, parameters and losses in float32.
            compile: whether to speed up the models' forward passes with torch.compile; slow at the start.

        Raises:
            ConfigurationError: this machine has no such device, or there is no such precision.
        """
        if precision not in PRECISIONS:
            raise ConfigurationError(f"trainers.NAME.precision={precision!r} must be one of {', '.join(PRECISIONS)}")
        self.device = usable_device(device, "trainers.NAME.device")
        if type(compile) is not bool:
            raise ConfigurationError(f"trainers.NAME.compile={compile!r} must be true or false")
        self._autocast, self._compile = precision == "bfloat16", compile

    def place(self, module: M) -> M:
        """Move a module to the device, and compile its forward pass if that is configured."""
        module = module.to(self.device)
        if self._compile:
            module.compile()
        return module

    def compiled(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return another of a model's functions, compiled if that is configured."""
        return torch.compile(function) if self._compile else function

    def tensor(self, array: Array) -> Tensor:
        """Return an array as a tensor on the device."""
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast)
