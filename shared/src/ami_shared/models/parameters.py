"""A model's parameters and buffers as named arrays, and back: checked first, copied or used in place second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import WireError
from ami_shared.snapshots import Layout
from ami_shared.wire import Array

CHUNK = 1 << 17  # elements, or floats: stay in the cache


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


def read_finite(module: nn.Module, layout: Layout, content: Array) -> bool:
    """Copy a module's state into one piece of memory of its layout; return whether all of it is finite.

    What was copied is looked at while it is in the processor's cache: it costs a fifth of a look at memory.

    Args:
        content: (layout.nbytes,) uint8.
    """
    look, begin, sums = torch.from_numpy(content.view(np.float32)), 0, []
    arrays = layout.arrays(content)
    for (name, _, _, offset), tensor in zip(layout.entries, module.state_dict().values(), strict=True):
        target, source = arrays[name].reshape(-1), _on_host(tensor)
        for first in range(0, len(source), CHUNK):
            part = source[first : first + CHUNK]
            np.copyto(target[first : first + CHUNK], part)  # for large pieces faster than torch's
            end = (offset + (first + len(part)) * part.itemsize) // 4
            if end - begin >= CHUNK:
                sums.append(float(look[begin:end].sum()))
                begin = end
    sums.append(float(look[begin:].sum()))
    if _all_single(layout) and all(map(math.isfinite, sums)):
        return True
    floating = (array for array in arrays.values() if array.dtype.kind in "fc")
    return all(bool(np.isfinite(array).all()) for array in floating)


def _all_single(layout: Layout) -> bool:
    """Whether all that could be other than finite is float32: then one look at the whole memory as such will do."""
    return all(dtype not in ("float16", "float64", "complex128") for _, dtype, _, _ in layout.entries)


def _on_host(tensor: Tensor) -> Array:
    return tensor.detach().cpu().contiguous().numpy().reshape(-1)


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
    return _numpy_dtype(tensor.dtype)


@cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
