"""The wire format: one message to frames and back. The meaning of messages is defined elsewhere.

    frame 0    topic       what PUB/SUB filters by; empty on control sockets
    frame 1    header      msgpack map, see below
    frame 2…   buffers     one for each array, raw bytes, C order, little endian

    header  v       int    protocol version
            type    str    message type
            from    str    name of the sending service
            inc     str    its incarnation
            fields  map    the message's own scalars, lists and maps
            arrays  list   [name, dtype, [shape…]] for each buffer, in order; a small array has no buffer, its bytes
                           are a fourth item

Decoding is total: any frames give a Message or a WireError. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray

from ami_shared import limits
from ami_shared.errors import WireError

Array = NDArray[Any]
T = TypeVar("T")

SMALL = 1024  # bytes: a separate frame for so small an array would cost more than copying it

ALLOWED_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in ALLOWED_DTYPES.items()}
_ENTRIES = {(str, str, list), (str, str, list, bytes)}


@dataclass(frozen=True)
class Message:
    """One message of any kind: who sent it, its fields, and its arrays."""

    kind: str
    sender: str
    incarnation: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    topic: bytes = b""

    def get(self, name: str, expected: type[T]) -> T:
        """Return the field `name`; raise WireError if it is absent or not of type `expected`."""
        return typed(self.fields, name, expected, self.kind)


def typed(fields: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    """Return `fields[name]` if it is a `kind` (an int is accepted as a float); raise WireError otherwise."""
    value = fields.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise WireError(f"{where}: field {name!r} must be {kind.__name__}, is {type(value).__name__}")
    return value


def encode(message: Message) -> list[bytes | memoryview]:
    """Encode a message as frames. Contiguous arrays are not copied.

    Raises:
        WireError: a field or an array is of a type that cannot be sent, or exceeds what decode() accepts.
    """
    layout: list[list[Any]] = []
    buffers: list[bytes | memoryview] = []
    for name, array in message.arrays.items():
        dtype_name = _NAMES.get(array.dtype.newbyteorder("<"))
        if dtype_name is None:
            raise WireError(f"{message.kind}: array {name!r} has dtype {array.dtype}, which is not sent")
        if len(name) > limits.MAX_NAME_LENGTH or array.ndim > limits.MAX_DIMENSIONS:
            raise WireError(f"{message.kind}: array {name!r:.80} has {array.ndim} dimensions, or too long a name")
        layout.append([name, dtype_name, array.shape])
        contiguous = np.ascontiguousarray(array, ALLOWED_DTYPES[dtype_name])
        if array.nbytes <= SMALL:
            layout[-1].append(contiguous.tobytes())
        else:
            buffers.append(contiguous.data.cast("B") if array.ndim else contiguous.reshape(1).data.cast("B"))
    content = {
        "v": limits.PROTOCOL_VERSION,
        "type": message.kind,
        "from": message.sender,
        "inc": message.incarnation,
        "fields": dict(message.fields),
        "arrays": layout,
    }
    try:
        header = msgpack.packb(content, default=_plain)
        fields = msgpack.packb({"fields": content["fields"]}, default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"{message.kind}: {error}, which is not sent") from None
    for key in ("type", "from", "inc"):
        _name(content, key)
    if len(layout) > limits.MAX_ARRAYS:
        raise WireError(f"{message.kind}: {len(layout)} arrays, limit {limits.MAX_ARRAYS}")
    _check_size(header)
    _decode_header(fields)  # the rest of the header is ours
    return [message.topic, header, *buffers]


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to a Python number."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a field holds a {type(value).__name__}")


def decode(frames: Sequence[bytes | memoryview]) -> Message:
    """Decode frames to a message; its arrays are views of the frames, read-only if these are.

    Raises:
        WireError: the frames are not what encode() makes; detected within bounded time and memory.
    """
    if not 2 <= len(frames) <= 2 + limits.MAX_ARRAYS:
        raise WireError(f"{len(frames)} frames, expected 2 to {2 + limits.MAX_ARRAYS}")
    header = _decode_header(frames[1])
    version = header.get("v")
    if version not in limits.PROTOCOL_VERSIONS or type(version) is not int:
        raise WireError(f"protocol version {version!r:.40}, this side has version {limits.PROTOCOL_VERSION}")
    return Message(
        kind=_name(header, "type"),
        sender=_name(header, "from"),
        incarnation=_name(header, "inc"),
        fields=typed(header, "fields", dict, "header"),
        arrays=_decode_arrays(typed(header, "arrays", list, "header"), frames[2:]),
        topic=bytes(frames[0]),
    )


def _check_size(header: bytes | memoryview) -> None:
    if len(header) > limits.MAX_HEADER_BYTES:
        raise WireError(f"header of {len(header)} bytes, limit {limits.MAX_HEADER_BYTES}")


def _decode_header(frame: bytes | memoryview) -> dict[str, Any]:
    _check_size(frame)
    try:
        header = msgpack.unpackb(
            frame,
            max_map_len=limits.MAX_MAP_LENGTH,
            max_array_len=min(limits.MAX_SEQUENCE_LENGTH, len(frame)),  # memory for a list is taken before it is read
            max_ext_len=0,
            ext_hook=_refuse_extension,  # max_ext_len lets empty ones pass
        )
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError(f"header is not msgpack: {type(error).__name__}") from None
    if not isinstance(header, dict):
        raise WireError(f"header is a {type(header).__name__}, expected a map")
    _check_nesting({key: value for key, value in header.items() if key != "arrays"})  # those are flat, or refused
    return header


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _check_nesting(header: Mapping[str, Any]) -> None:
    """Refuse keys in bytes, and deep nesting, which would exhaust the stack when printed, compared or packed."""
    level: list[Any] = [header]
    for _ in range(limits.MAX_NESTING):
        if not all(type(key) is str for part in level if isinstance(part, dict) for key in part):
            raise WireError("header: the key of a map is not a text")
        values = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for items in values for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise WireError(f"header is nested deeper than {limits.MAX_NESTING} levels")


def _name(header: Mapping[str, Any], key: str) -> str:
    name = typed(header, key, str, "header")
    if not 0 < len(name) <= limits.MAX_NAME_LENGTH:
        raise WireError(f"header: {key!r} has {len(name)} characters, limit {limits.MAX_NAME_LENGTH}")
    return name


def _decode_arrays(layout: list[Any], buffers: Sequence[bytes | memoryview]) -> dict[str, Array]:
    if len(layout) > limits.MAX_ARRAYS:
        raise WireError(f"header tells of {len(layout)} arrays, limit {limits.MAX_ARRAYS}")
    arrays: dict[str, Array] = {}
    left = iter(buffers)
    for entry in layout:
        name, array = _decode_array(entry, left)
        if name in arrays:
            raise WireError(f"array {name!r:.80} appears twice")
        arrays[name] = array
    if next(left, None) is not None:
        raise WireError(f"{len(buffers)} buffers came, more than the header tells of")
    return arrays


def _decode_array(entry: Any, buffers: Iterator[bytes | memoryview]) -> tuple[str, Array]:
    if type(entry) is not list or tuple(map(type, entry)) not in _ENTRIES:
        raise WireError("array entry is not [name, dtype, shape] or [name, dtype, shape, bytes]")
    name, dtype_name, shape = entry[:3]
    buffer = entry[3] if len(entry) == 4 else next(buffers, None)
    if len(name) > limits.MAX_NAME_LENGTH:
        raise WireError(f"array name of {len(name)} characters, limit {limits.MAX_NAME_LENGTH}")
    if buffer is None:
        raise WireError(f"array {name!r}: its buffer did not come")
    dtype = ALLOWED_DTYPES.get(dtype_name)
    if dtype is None:
        raise WireError(f"array {name!r}: dtype {dtype_name!r:.40} is not allowed")
    if len(shape) > limits.MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise WireError(f"array {name!r}: its shape is not a list of up to {limits.MAX_DIMENSIONS} sizes")
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(buffer):
        raise WireError(f"array {name!r}: {len(buffer)} bytes, {dtype_name}{shape} needs {expected}")
    try:
        return name, np.frombuffer(buffer, dtype=dtype).reshape(shape)
    except ValueError:  # an empty array whose other dimensions are beyond any memory
        raise WireError(f"array {name!r}: bad shape {shape!r:.80}") from None
