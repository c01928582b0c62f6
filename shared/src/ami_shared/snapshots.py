"""Snapshots: one model's parameters at one moment, with version and digest, and their way over the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from ami_shared.errors import WireError
from ami_shared.wire import Array, Message

MESSAGE_TYPE = "snapshot"


def topic(model: str) -> bytes:
    """Return the topic of one model's snapshots; the closing slash keeps `a` from matching `ab`."""
    return f"parameters/{model}/".encode()


@dataclass(frozen=True)
class Snapshot:
    """One model's parameters at one moment.

    Attributes:
        version: grows for the whole life of the system.
        created: seconds since the epoch, by the trainer's clock.
        arrays: state_dict name → array, in the model's own order.
        digest: xxh3-64 over names, dtypes, shapes and bytes.
    """

    model: str
    version: int
    created: float
    arrays: Mapping[str, Array]
    digest: int

    @classmethod
    def seal(cls, model: str, version: int, created: float, arrays: Mapping[str, Array]) -> Snapshot:
        """Make a snapshot of arrays that will not change any more, computing its digest."""
        return cls(model, version, created, arrays, digest(model, version, arrays))

    def to_message(self, sender: str, incarnation: str) -> Message:
        """Return the message that from_message() reads back."""
        fields = {
            "model": self.model,
            "version": self.version,
            "created": self.created,
            "digest": self.digest,
        }
        return Message(MESSAGE_TYPE, sender, incarnation, fields, self.arrays, topic(self.model))

    @classmethod
    def from_message(cls, message: Message) -> Snapshot:
        """Read a snapshot and verify its digest; raise WireError where anything is off."""
        if message.kind != MESSAGE_TYPE:
            raise WireError(f"message {message.kind!r:.40} on the parameter stream")
        model, version = message.get("model", str), message.get("version", int)
        expected = message.get("digest", int)
        if not 0 <= version < 1 << 62:
            raise WireError(f"snapshot of {model!r:.40}: version {version} out of range")
        if digest(model, version, message.arrays) != expected:
            raise WireError(f"snapshot {version} of {model!r:.40}: digest does not fit its bytes")
        return cls(model, version, message.get("created", float), message.arrays, expected)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


def digest(model: str, version: int, arrays: Mapping[str, Array]) -> int:
    """Return the xxh3-64 of a snapshot's identity, layout and bytes."""
    state = xxhash.xxh3_64(f"{model}\0{version}".encode())
    for name, array in arrays.items():
        state.update(f"{name}\0{array.dtype.name}\0{array.shape}".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.intdigest()
