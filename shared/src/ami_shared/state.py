"""State: what a part of the system must remember, as a tree of maps, and the files of it in a checkpoint.

A tree's leaves are arrays and JSON values (null, booleans, numbers, strings, lists of these). It becomes two files:

    NAME.json           the tree without its arrays
    NAME.safetensors    the arrays, each under its path in the tree: a/b/c

Parsing is total: any bytes give a tree or a WireError. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ami_shared import limits
from ami_shared.errors import WireError
from ami_shared.wire import Array

log = logging.getLogger(__name__)

Tree = Mapping[str, Any]

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
CLASS = "class"
DOES_NOT_FIT = (  # what a component raises whose earlier state has another form; RuntimeError: load_state_dict()
    WireError, KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError,
)  # fmt: skip


def state_of(component: Any) -> Tree:
    """Return a component's state and class; a component without state() has none."""
    state: Tree = component.state() if hasattr(component, "state") else {}
    return {**state, CLASS: type(component).__qualname__} if state else {}


@dataclass(frozen=True)
class Restorable:
    """A component that may lack state: it starts afresh without restore(), or without a kept state of its class."""

    component: Any

    def restore(self, state: Tree) -> None:
        if not state or not hasattr(self.component, "restore"):
            return
        own, kept = type(self.component).__qualname__, dict(state)
        if (theirs := kept.pop(CLASS, own)) == own:
            self.component.restore(kept)
        else:
            log.warning("%s starts afresh: what the checkpoint has in its place belongs to %s", own, theirs)


def restore_each(parts: Mapping[str, Any], state: Tree) -> None:
    """Restore the states of several components, of as many as fit.

    Raises:
        WireError: some do not fit; names all of them. They start afresh, the others have been restored.
    """
    misfits = []
    for name, component in parts.items():
        try:
            component.restore(state[name])
        except DOES_NOT_FIT as error:
            misfits.append(f"{name}: {' '.join(str(error).split()):.200}")
    if misfits:
        raise WireError("; ".join(misfits))


def copied(tree: Tree) -> dict[str, Any]:
    """Return the tree with copies of all arrays, so that it stays unchanged while its owner continues.

    Read-only arrays are never changed, and are not copied.
    """

    def leaf(value: Any) -> Any:
        return value.copy() if isinstance(value, np.ndarray) and value.flags.writeable else value

    return {name: copied(value) if isinstance(value, Mapping) else leaf(value) for name, value in tree.items()}


@dataclass(frozen=True)
class StateFile:
    """One file of a checkpoint, in memory: its path in the checkpoint, and its bytes in pieces."""

    path: str
    pieces: Sequence[bytes | memoryview]

    @property
    def nbytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes, starting at `offset`."""
        parts, at = [], 0
        for piece in self.pieces:
            first, end = max(offset - at, 0), min(offset + size - at, len(piece))
            if first < end:
                parts.append(piece[first:end])
            at += len(piece)
        return b"".join(parts)


def to_files(name: str, tree: Tree) -> list[StateFile]:
    """Return a tree's files. Arrays are not copied if they are contiguous.

    Raises:
        TypeError: a leaf is neither an array nor a JSON value.
    """
    arrays: dict[str, Array] = {}
    scalars = _without_arrays(tree, "", arrays)
    files = [StateFile(f"{name}.json", [json.dumps(scalars).encode()])]
    if arrays:
        files.append(StateFile(f"{name}.safetensors", _safetensors(arrays)))
    return files


def names_of(paths: Iterable[str]) -> list[str]:
    """Return the names of the trees to which some files belong."""
    return [path.removesuffix(".json") for path in paths if path.endswith(".json")]


def from_files(name: str, files: Mapping[str, bytes] | Mapping[str, bytearray]) -> dict[str, Any]:
    """Return the tree from the files that to_files() made of it; arrays are views.

    Raises:
        WireError: a file is missing or malformed.
    """
    try:
        tree = json.loads(files[f"{name}.json"])
    except (KeyError, ValueError, RecursionError) as error:
        raise WireError(f"{name}.json cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise WireError(f"{name}.json holds no map")
    path = f"{name}.safetensors"
    for place, array in (_read_safetensors(path, files[path]) if path in files else {}).items():
        *above, last = place.split("/")
        node: Any = tree
        for step in above:
            node = node.get(step)
            if not isinstance(node, dict):
                raise WireError(f"{path}: there is no place for {place}")
        node[last] = array
    return tree


def _without_arrays(tree: Tree, prefix: str, into: dict[str, Array]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(name, str) or "/" in name:
            raise TypeError(f"state: {name!r} under {prefix or 'the root'} is not a name")
        if isinstance(value, Mapping):
            kept[name] = _without_arrays(value, f"{prefix}{name}/", into)
        elif isinstance(value, np.ndarray):
            into[prefix + name] = value
        else:
            kept[name] = value.item() if isinstance(value, np.generic) else value
    return kept


def _safetensors(arrays: Mapping[str, Array]) -> list[bytes | memoryview]:
    """Return a safetensors file (Hugging Face's format): length of the header, header (JSON), the arrays' bytes."""
    header, at, pieces = {}, 0, []
    for name, array in arrays.items():
        if array.dtype not in NAMES:
            raise TypeError(f"state: {name} has dtype {array.dtype}, which is not kept")
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        pieces.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        at += array.nbytes
    told = json.dumps(header).encode()
    told += b" " * (-(8 + len(told)) % ALIGNMENT)
    return [struct.pack("<Q", len(told)) + told, *pieces]


def _read_safetensors(path: str, content: bytes | bytearray) -> dict[str, Array]:
    view = memoryview(content)
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > limits.MAX_STATE_HEADER_BYTES or 8 + length > len(view):
        raise WireError(f"{path} is cut short, or not of this format")
    try:
        header = json.loads(bytes(view[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise WireError(f"{path}: header cannot be read ({error})") from None
    if not isinstance(header, dict):
        raise WireError(f"{path}: header holds no map")
    data = view[8 + length :]
    return {name: _array(path, name, about, data) for name, about in header.items() if name != "__metadata__"}


def _array(path: str, name: str, about: Any, data: memoryview) -> Array:
    match about:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if dtype in DTYPES:
            sizes = all(type(n) is int and 0 <= n < 1 << 48 for n in shape) and len(shape) <= limits.MAX_DIMENSIONS
            kind = np.dtype(DTYPES[dtype]).newbyteorder("<")
            if sizes and 0 <= begin <= end <= len(data) and end - begin == math.prod(shape) * kind.itemsize:
                return np.frombuffer(data[begin:end], kind).reshape(shape)
    raise WireError(f"{path}: {name!r:.80} is not described correctly")
