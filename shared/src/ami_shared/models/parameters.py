"""A model's parameters and buffers as named arrays, and back: checked first, copied second."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ami_shared.errors import WireError
from ami_shared.wire import Array


def read_arrays(module: nn.Module, into: dict[str, Array] | None = None) -> dict[str, Array]:
    """Copy a module's state to host arrays, reusing the arrays of an earlier call."""
    arrays = into if into is not None else {}
    for name, tensor in module.state_dict().items():
        if name not in arrays:
            arrays[name] = np.empty(tuple(tensor.shape), torch.empty(0, dtype=tensor.dtype).numpy().dtype)
        torch.from_numpy(arrays[name]).copy_(tensor)
    return arrays


def write_arrays(module: nn.Module, arrays: Mapping[str, Array]) -> None:
    """Copy arrays into a module whose layout they must fit exactly.

    Raises:
        WireError: a name, shape or dtype differs; the module is then untouched.
    """
    state = module.state_dict()
    if state.keys() != arrays.keys():
        odd = sorted(state.keys() ^ arrays.keys())
        raise WireError(f"parameters do not fit the model: {', '.join(odd[:3])} on one side only")
    for name, tensor in state.items():
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        if tuple(tensor.shape) != arrays[name].shape or arrays[name].dtype != dtype:
            theirs = f"{arrays[name].dtype.name}{list(arrays[name].shape)}"
            raise WireError(f"parameter {name}: {theirs} does not fit {dtype.name}{list(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(np.array(arrays[name], copy=True)))
