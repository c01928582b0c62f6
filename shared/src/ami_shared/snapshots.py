"""Snapshots: one model's parameters at one moment, and the two ways in which they reach their users.

snapshot    over the wire: all bytes, with a digest                                   topic parameters/<model>/
notice      to processes of the same host: where in memory the snapshot can be seen   topic notices/<model>/
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import xxhash

from ami_shared import limits
from ami_shared.errors import WireError
from ami_shared.shared_memory import Reader, Reference
from ami_shared.wire import ALLOWED_DTYPES, Array, Message

SNAPSHOT, NOTICE = "snapshot", "notice"
SNAPSHOT_TOPIC, NOTICE_TOPIC = b"parameters/", b"notices/"
ALIGNMENT = 64
CHUNK = 1 << 16  # elements: stay in the cache
REMEMBERED_ENTRIES = 2_000
NO_LAYOUT = "a layout is not [[name, dtype, shape, offset]…] within its memory"


def topic(model: str) -> bytes:
    """Return the topic of one model's snapshots; the closing slash keeps `a` from matching `ab`."""
    return SNAPSHOT_TOPIC + f"{model}/".encode()


def notice_topic(model: str) -> bytes:
    """Return the topic of the notices of one model's snapshots."""
    return NOTICE_TOPIC + f"{model}/".encode()


@dataclass(frozen=True)
class Snapshot:
    """One model's parameters at one moment.

    Attributes:
        version: grows throughout the life of the system.
        created: seconds since the epoch, by the hub's clock.
        arrays: state_dict name → array, in the model's own order.
        lasting: whether the arrays may be used indefinitely without copying them.
        halved: whether its float32 arrays arrived as bfloat16: sent on as such, they lose nothing more.
    """

    model: str
    version: int
    created: float
    arrays: Mapping[str, Array]
    lasting: bool = False
    halved: bool = False

    def to_message(
        self, sender: str, incarnation: str, halved: bool = False, part: tuple[int, int] = (0, 1)
    ) -> Message:
        """Return the message that from_message() reads back.

        Args:
            sender: name of the sending service.
            incarnation: of the sending service.
            halved: send float32 as bfloat16: half the bytes, and three significant digits.
            part: index and number of parts, if this is one part of a snapshot.
        """
        narrow = [name for name, array in self.arrays.items() if halved and array.dtype == np.float32]
        arrays = {name: _narrowed(array) if name in narrow else array for name, array in self.arrays.items()}
        fields: dict[str, Any] = {
            "model": self.model,
            "version": self.version,
            "created": self.created,
            "digest": digest(self.model, self.version, arrays, part),
        }
        if narrow:
            fields["bfloat16"] = narrow
        if part != (0, 1):
            fields["part"] = list(part)
        return Message(SNAPSHOT, sender, incarnation, fields, arrays, topic(self.model))

    def to_parts(self, sender: str, incarnation: str, halved: bool = False) -> Iterator[Message]:
        """Yield the snapshot as messages of a few megabytes each; arrays are not split."""
        aim = max(limits.SNAPSHOT_PART_BYTES, self.nbytes // limits.SNAPSHOT_PARTS)
        parts: list[dict[str, Array]] = [{}]
        nbytes = 0
        for name, array in self.arrays.items():
            if nbytes and nbytes + array.nbytes > aim:
                parts.append({})
                nbytes = 0
            parts[-1][name] = array
            nbytes += array.nbytes
        for index, arrays in enumerate(parts):
            yield replace(self, arrays=arrays).to_message(sender, incarnation, halved, (index, len(parts)))

    @classmethod
    def from_message(cls, message: Message, lasting: bool = False) -> Snapshot:
        """Parse a snapshot, or one part of it, and verify its digest.

        Args:
            message: the message; the arrays are views of it, unless they arrived as bfloat16.
            lasting: copy them while they are in the processor's caches, so that they may be used indefinitely.

        Raises:
            WireError: it is malformed, or the digest does not fit.
        """
        if message.kind != SNAPSHOT:
            raise WireError(f"message {message.kind!r:.40} on the parameter stream")
        model, version = _model_and_version(message)
        if digest(model, version, message.arrays, part_of(message)) != message.get("digest", int):
            raise WireError(f"snapshot {version} of {model!r:.40}: digest does not fit its bytes")
        arrays, wide = dict(message.arrays), {}
        for name in message.get("bfloat16", list) if "bfloat16" in message.fields else ():
            if not isinstance(name, str) or name in wide or name not in arrays or arrays[name].dtype != np.uint16:
                raise WireError(f"snapshot {version} of {model!r:.40}: {name!r:.80} cannot be bfloat16")
            wide[name] = _widened(arrays[name])
        if lasting:
            arrays = {name: array if name in wide else _copied(array) for name, array in arrays.items()}
        created, halved = message.get("created", float), "bfloat16" in message.fields
        return cls(model, version, created, arrays | wide, lasting, halved)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


def part_of(message: Message) -> tuple[int, int]:
    """Return a snapshot message's part as (index, number of parts); raise WireError if it is malformed."""
    match message.fields.get("part", [0, 1]):
        case [int(index), int(count)] if 0 <= index < count <= limits.MAX_ARRAYS and type(index) is type(count) is int:
            return index, count
    raise WireError("snapshot: part is not [index, number of parts]")


def digest(model: str, version: int, arrays: Mapping[str, Array], part: tuple[int, int] = (0, 1)) -> int:
    """Return the xxh3-64 of a snapshot's identity, layout and bytes."""
    state = xxhash.xxh3_64(f"{model}\0{version}".encode())
    if part != (0, 1):
        state.update(f"\0{part[0]}/{part[1]}".encode())
    for name, array in arrays.items():
        state.update(f"{name}\0{array.dtype.name}\0{array.shape}".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.intdigest()


def _copied(array: Array) -> Array:
    """Return a copy that begins at an aligned address, as fast kernels like it."""
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    copy: Array = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def _narrowed(array: Array) -> Array:
    """Return float32 rounded to the nearest finite bfloat16, ties to even, as its upper 16 bits; finite values only."""
    bits, narrow = np.ascontiguousarray(array).reshape(-1).view(np.uint32), np.empty(array.size, np.uint16)
    for first in range(0, len(bits), CHUNK):
        part = bits[first : first + CHUNK]
        rounded = part >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += part
        rounded >>= 16
        rounded[(rounded & 0x7FFF) == 0x7F80] -= 1  # not up to infinity
        narrow[first : first + CHUNK] = rounded
    return narrow.reshape(array.shape)


def _widened(upper: Array) -> Array:
    wide = np.empty(upper.shape, np.uint32)
    np.left_shift(upper, 16, out=wide, dtype=np.uint32)
    return wide.view(np.float32)


def _model_and_version(message: Message) -> tuple[str, int]:
    model, version = message.get("model", str), message.get("version", int)
    if not 0 <= version < limits.MAX_NUMBER:
        raise WireError(f"{message.kind} of {model!r:.40}: version {version} out of range")
    return model, version


@dataclass(frozen=True)
class Layout:
    """Where in a piece of memory each array of a model is.

    Attributes:
        entries: name, dtype's name, shape and offset in bytes of each array.
        nbytes: size of all of them.
    """

    entries: tuple[tuple[str, str, tuple[int, ...], int], ...]
    nbytes: int

    @classmethod
    def of(cls, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
        """Lay out arrays given by name → (dtype's name, shape), one after the other, each aligned."""
        entries, offset = [], 0
        for name, (dtype, shape) in arrays.items():
            entries.append((name, dtype, shape, offset))
            nbytes = math.prod(shape) * ALLOWED_DTYPES[dtype].itemsize
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(entries), offset)

    @classmethod
    def from_list(cls, entries: list[Any], nbytes: int) -> Layout:
        """Parse a layout; raise WireError if an entry is malformed or reaches beyond `nbytes`."""
        try:
            read = tuple((name, dtype, tuple(shape), offset) for name, dtype, shape, offset in entries)
            return _layout(read, nbytes) if len(read) <= REMEMBERED_ENTRIES else _layout.__wrapped__(read, nbytes)
        except (TypeError, ValueError):
            raise WireError(NO_LAYOUT) from None

    def arrays(self, content: Array) -> dict[str, Array]:
        """Return the arrays as views of a piece of memory, (nbytes,) uint8."""
        views = {}
        for name, dtype_name, shape, offset in self.entries:
            dtype = ALLOWED_DTYPES[dtype_name]
            end = offset + math.prod(shape) * dtype.itemsize
            views[name] = content[offset:end].view(dtype).reshape(shape)
        return views

    def stretches(self, content: Array, nbytes: int) -> list[tuple[int, Array]]:
        """Return memory laid out by of() as few contiguous stretches, each of whole arrays of one dtype.

        Args:
            content: the memory, (nbytes,) uint8; the few bytes between arrays have never been written to.
            nbytes: a stretch ends with the array that reaches this size.

        Returns:
            The number of arrays up to the end of each stretch, and its numbers, (N,) of the dtype.
        """
        dtypes = [dtype_name for _, dtype_name, _, _ in self.entries]
        ends = [*(offset for _, _, _, offset in self.entries[1:]), self.nbytes]
        stretches, begin = [], 0
        for count, (dtype, following, end) in enumerate(zip(dtypes, [*dtypes[1:], None], ends, strict=False), 1):
            if following != dtype or end - begin >= nbytes:
                stretches.append((count, content[begin:end].view(ALLOWED_DTYPES[dtype])))
                begin = end
        return stretches

    @cached_property
    def as_list(self) -> list[Any]:
        """The list that from_list() reads back."""
        return [[name, dtype, list(shape), offset] for name, dtype, shape, offset in self.entries]


@lru_cache(maxsize=limits.MOST_MODELS)  # every notice of a model has the same one
def _layout(entries: tuple[tuple[Any, Any, tuple[Any, ...], Any], ...], nbytes: int) -> Layout:
    for name, dtype, shape, offset in entries:
        if not (
            type(name) is type(dtype) is str
            and len(name) <= limits.MAX_NAME_LENGTH
            and dtype in ALLOWED_DTYPES
            and len(shape) <= limits.MAX_DIMENSIONS
            and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            and type(offset) is int
            and math.prod(size for size in shape if size) < 1 << 48  # numpy refuses larger shapes, even of no bytes
            and 0 <= offset <= nbytes - math.prod(shape) * ALLOWED_DTYPES[dtype].itemsize
            and offset % ALIGNMENT == 0
        ):
            raise WireError(NO_LAYOUT)
    return Layout(entries, nbytes)


@dataclass(frozen=True)
class Notice:
    """Announces a new snapshot, and where processes of the same host find it.

    Attributes:
        reference: None if it can only be had over the wire.
    """

    model: str
    version: int
    created: float
    reference: Reference | None
    layout: Layout

    def to_message(self, sender: str, incarnation: str) -> Message:
        """Return the message that from_message() reads back."""
        fields = {
            "model": self.model,
            "version": self.version,
            "created": self.created,
            "memory": self.reference.to_list() if self.reference else None,
            "layout": self.layout.as_list,
        }
        return Message(NOTICE, sender, incarnation, fields, topic=notice_topic(self.model))

    @classmethod
    def from_message(cls, message: Message) -> Notice:
        """Parse a notice; raise WireError if it is malformed."""
        model, version = _model_and_version(message)
        memory = message.fields.get("memory")
        created = message.get("created", float)
        if memory is None:
            return cls(model, version, created, None, Layout((), 0))
        reference = Reference.from_list(message.get("memory", list))
        layout = Layout.from_list(message.get("layout", list), reference.nbytes)
        return cls(model, version, created, reference, layout)

    def snapshot(self, reader: Reader) -> Snapshot | None:
        """Return the snapshot from the memory that the notice names; None if that is out of reach."""
        content = reader.look(self.reference) if self.reference else None
        if content is None:
            return None
        return Snapshot(self.model, self.version, self.created, self.layout.arrays(content), lasting=True)
