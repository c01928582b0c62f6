"""A model's parameters and buffers as named arrays, and back: checked first, copied or used in place second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import WireError
from ami_shared.snapshots import Layout
from ami_shared.wire import Array

CHUNK = 1 << 18  # elements


def read_arrays(module: nn.Module, into: dict[str, Array] | None = None) -> dict[str, Array]:
    """Copy a module's state to host arrays, reusing the arrays of an earlier call."""
    arrays = into if into is not None else {}
    for name, tensor in module.state_dict().items():
        if name not in arrays:
            arrays[name] = np.empty(tuple(tensor.shape), _dtype(tensor))
        torch.from_numpy(arrays[name]).copy_(tensor)
    return arrays


def layout_of(module: nn.Module) -> Layout:
    """Return how a module's state lies in one piece of memory."""
    state = module.state_dict()
    return Layout.of({name: (_dtype(tensor).name, tuple(tensor.shape)) for name, tensor in state.items()})


def read_finite(module: nn.Module, arrays: dict[str, Array]) -> bool:
    """Copy a module's state to host arrays of its layout; return whether all of it is finite.

    What was copied is looked at while it is in the processor's cache: it costs a fifth of a look at memory.
    """
    finite = True
    for name, tensor in module.state_dict().items():
        finite &= _copy_finite(torch.from_numpy(arrays[name]).reshape(-1), tensor.detach())
    return finite


def _copy_finite(target: Tensor, source: Tensor) -> bool:
    if source.device.type != "cpu" or not source.is_contiguous():
        target.copy_(source.reshape(-1))
        return not target.is_floating_point() or bool(target.isfinite().all())
    sums = []
    for into, part in zip(torch.split(target, CHUNK), torch.split(source.reshape(-1), CHUNK), strict=True):
        np.copyto(into.numpy(), part.numpy())  # for large pieces faster than torch's
        if target.is_floating_point() or target.is_complex():
            sums.append(into.sum())
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return True
    return bool(target.isfinite().all())  # finite numbers may have a sum that is not


def write_arrays(module: nn.Module, arrays: Mapping[str, Array], in_place: bool = False) -> None:
    """Fill a module with arrays whose layout must fit it exactly.

    Args:
        in_place: use the arrays where they are, without a copy; nobody may write to them from then on.

    Raises:
        WireError: a name, shape or dtype differs; the module is then untouched.
    """
    state = module.state_dict(keep_vars=True)
    if state.keys() != arrays.keys():
        odd = sorted(state.keys() ^ arrays.keys())
        raise WireError(f"parameters do not fit the model: {', '.join(odd[:3])} on one side only")
    for name, tensor in state.items():
        dtype = _dtype(tensor)
        if tuple(tensor.shape) != arrays[name].shape or arrays[name].dtype != dtype:
            theirs = f"{arrays[name].dtype.name}{list(arrays[name].shape)}"
            raise WireError(f"parameter {name}: {theirs} does not fit {dtype.name}{list(tensor.shape)}")
    for name, tensor in state.items():
        if tensor.device.type != "cpu":
            tensor.data.copy_(torch.from_numpy(np.array(arrays[name])))
        elif in_place:
            tensor.data = torch.from_numpy(arrays[name])
        else:
            np.copyto(tensor.detach().numpy(), arrays[name])


def _dtype(tensor: Tensor) -> np.dtype[Any]:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype
