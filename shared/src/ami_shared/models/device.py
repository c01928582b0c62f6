"""Where models compute: the devices of torch, as configurations name them."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ami_shared.errors import AmiError, ConfigurationError
from ami_shared.wire import Array

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
PIECE_BYTES = 16 << 20


def usable_device(name: str, key: str) -> torch.device:
    """Return a device by its name: cpu, cuda, cuda:1 …

    Args:
        name: as in the configuration.
        key: the configuration key of the name, for the error message.

    Raises:
        ConfigurationError: this machine has no such device.
        AmiError: its memory is full.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if "out of memory" in reason:  # of several classes
            raise AmiError(f"{key}={name!r} is full ({reason:.200}): end what else uses it") from None
        raise ConfigurationError(f"{key}={name!r} cannot be used here ({reason})") from None
    return device


def device_of(*modules: nn.Module) -> torch.device:
    """Return the device of the first parameter of some modules; the CPU if there are none."""
    return next((parameter.device for module in modules for parameter in module.parameters()), CPU)


def pinned_for(device: torch.device) -> Callable[[Array], None]:
    """Return a function that prepares host memory to which a device will copy repeatedly.

    For a GPU the memory is page-locked for as long as the array lives, which makes copies several times as fast; if the
    system does not allow that, copies are slower.
    """
    return partial(_pin, device) if device.type == "cuda" else lambda memory: None


def _pin(device: torch.device, memory: Array) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        if int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data)
            return
        log.info("%d bytes of memory cannot be locked for the GPU: copies to it are slower", memory.nbytes)
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)  # clears the error, which the next call would report otherwise


@contextmanager
def told_when_full(what_to_do: str) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU into one line for the user.

    Args:
        what_to_do: what reduces the memory needed, e.g. a smaller batch_size.

    Raises:
        AmiError: the memory of a GPU is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = ". ".join(str(error).split(". ")[:2])
        raise AmiError(f"the GPU's memory is full ({wanted}): {what_to_do}, or use the GPU for less else") from None


def uses_gpu() -> bool:
    """Whether this process has begun to use a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def gpu_statistics() -> dict[str, int]:
    """Return how much GPU memory this process has taken, if it uses any."""
    if not uses_gpu():
        return {}
    return {"gpu_memory_bytes": sum(map(torch.cuda.memory_reserved, range(torch.cuda.device_count())))}


class Aside:
    """Fills tensors on a device from host memory, in a separate stream, concurrently with what the device computes.

    While the driver copies from memory that is not page-locked, nothing else can use the device: everything is copied
    in pieces through two page-locked buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Let write() copy after all work queued before; wait for the copies at the end. No effect on the CPU."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def write(self, tensor: Tensor, array: Array) -> None:
        """Copy an array to a tensor of the same shape and dtype on the device; within copies()."""
        source = torch.from_numpy(array if array.flags.writeable else array.copy())
        if self._stream is None or not (tensor.is_contiguous() and source.is_contiguous()):
            tensor.copy_(source)
            return
        if not self._buffers:
            self._buffers = [
                (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
                for _ in range(2)
            ]
        there, here = (torch.split(whole.reshape(-1).view(torch.uint8), PIECE_BYTES) for whole in (tensor, source))
        for target, part in zip(there, here, strict=True):
            (buffer, free), *others = self._buffers
            self._buffers = [*others, (buffer, free)]
            free.synchronize()
            buffer[: len(part)].copy_(part)
            target.copy_(buffer[: len(part)], non_blocking=True)
            free.record()
