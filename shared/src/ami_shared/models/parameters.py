"""A model's parameters and buffers as named arrays, and back: first checked, then copied or used in place."""

from __future__ import annotations

from cmath import isfinite
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import WireError
from ami_shared.snapshots import Layout
from ami_shared.wire import Array


def read_arrays(module: nn.Module) -> dict[str, Array]:
    """Copy a module's state to new host arrays."""
    arrays: dict[str, Array] = {
        name: np.empty(tuple(tensor.shape), _dtype(tensor)) for name, tensor in module.state_dict().items()
    }
    copy_state(module, arrays)
    return arrays


def layout_of(module: nn.Module) -> Layout:
    """Return how a module's state is laid out in one piece of memory."""
    state = module.state_dict()
    return Layout.of({name: (_dtype(tensor).name, tuple(tensor.shape)) for name, tensor in state.items()})


def copy_state(module: nn.Module, arrays: Mapping[str, Array], on_copied: Callable[[], None] = lambda: None) -> None:
    """Copy a module's state to host arrays of the same names, shapes and dtypes.

    Args:
        module: whose state is copied.
        arrays: where to; filled in the order of the module's state.
        on_copied: called after each array.
    """
    for name, tensor in module.state_dict().items():
        if tensor.device.type == "cpu":
            np.copyto(arrays[name], tensor.numpy())  # for large ones faster than torch's copy
        else:
            torch.from_numpy(arrays[name]).copy_(tensor)
        on_copied()


def all_finite(arrays: Mapping[str, Array]) -> bool:
    """Return whether all numbers in writable arrays are finite."""
    return all(map(is_finite, arrays.values()))


def is_finite(array: Array) -> bool:
    """Return whether all numbers in a writable array are finite."""
    if array.dtype.kind not in "fc":
        return True
    total = torch.from_numpy(array).sum().item()  # one pass over memory; a finite sum means finite numbers,
    return isfinite(total) or bool(np.isfinite(array).all())  # an infinite one may be an overflow


def _copy_to_device(tensor: Tensor, array: Array) -> None:
    tensor.copy_(torch.from_numpy(np.array(array)))


def write_arrays(
    module: nn.Module,
    arrays: Mapping[str, Array],
    in_place: bool = False,
    to_device: Callable[[Tensor, Array], None] = _copy_to_device,
) -> None:
    """Fill a module with arrays whose layout must fit it exactly.

    Args:
        module: to be filled.
        arrays: state_dict name → array.
        in_place: use the arrays without copying them, if the module is on the CPU; they must not be written to from
            then on.
        to_device: copies to tensors that are not on the CPU.

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
            to_device(tensor.data, arrays[name])
        elif in_place:
            tensor.data = torch.from_numpy(arrays[name])
        else:
            np.copyto(tensor.detach().numpy(), arrays[name])


def _dtype(tensor: Tensor) -> np.dtype[Any]:
    return _numpy_dtype(tensor.dtype)


@cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
