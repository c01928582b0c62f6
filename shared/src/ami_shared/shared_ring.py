"""A ring of bytes that processes of one host share: one writes continuously, any number read, and none waits.

Positions count all bytes that were ever written, so that they are unique. Before the writer overwrites anything, the
ring's head says up to which position it is gone. A reader copies what it wants, and then checks the head: what may have
been overwritten in the meantime is discarded. The head runs ahead of the writing by at least the largest piece, which
is more than any processor delays its stores. Like all memory of shared_memory.py it is freed with its last holder.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import DTypeLike

from ami_shared import shared_memory
from ami_shared.errors import WireError
from ami_shared.shared_memory import HEAD_BYTES, Reference, make_memory, open_memory
from ami_shared.wire import Array

HEAD = struct.Struct("<8s16sQ")  # magic, token of the ring, position before which all is gone
MAGIC = b"AMI ring"
ALIGNMENT = 64
GUARD_SHARE = 16
SMALLEST = ALIGNMENT * GUARD_SHARE

Span = tuple[int, int]  # position, number of bytes


class Ring:
    """The writer's end. If no memory can be shared it is private, and has no reference.

    Attributes:
        end: position after what was written last.
        gone: everything before this position has been, or may at any moment be, overwritten.
        largest: number of bytes that may be written in one piece.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = max(SMALLEST, capacity_bytes // ALIGNMENT * ALIGNMENT)
        self.largest = self._capacity // GUARD_SHARE
        self.gone = self.end = 0
        self.reference: Reference | None = None
        nbytes = HEAD_BYTES + self._capacity
        memory = None
        if shared_memory.can_share():
            with suppress(OSError):
                fd, memory = make_memory(nbytes)
        if memory:
            weakref.finalize(self, os.close, fd)
            token = secrets.token_bytes(16)
            HEAD.pack_into(memory, 0, MAGIC, token, 0)
            self.reference = Reference(os.getpid(), fd, token, 0, self._capacity)
        else:
            memory = mmap.mmap(-1, nbytes)
        self._head = np.frombuffer(memory, np.uint64, count=1, offset=HEAD.size - 8)
        self._content = np.frombuffer(memory, np.uint8, offset=HEAD_BYTES)
        self._address = self._content.ctypes.data

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return an uninitialised array of at most `largest` bytes, to be filled before anything else is written."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        offset = self._reserve(nbytes)
        return self._content[offset : offset + nbytes].view(dtype).reshape(shape)

    def keep(self, frame: bytes | memoryview) -> Span:
        """Return where a frame of at most `largest` bytes is; it is copied unless it is in the ring already."""
        values = np.frombuffer(frame, np.uint8)
        offset = values.ctypes.data - self._address
        if not 0 <= offset < self._capacity:
            offset = self._reserve(len(values))
            self._content[offset : offset + len(values)] = values
        return self.end - (self.end - offset) % self._capacity, len(values)

    def leaves(self, position: int) -> bool:
        """Return whether pieces of `largest` bytes together will overwrite nothing at `position` and later."""
        return self.end + 3 * self.largest - self._capacity <= position  # more is left out between them, and at a wrap

    def is_recent(self, position: int) -> bool:
        """Return whether less than half of the ring has been written since a position."""
        return self.end - position < self._capacity // 2

    def view(self, span: Span) -> memoryview:
        """Return a view of a span; valid until it is gone."""
        offset = span[0] % self._capacity
        return self._content[offset : offset + span[1]].data

    def _reserve(self, nbytes: int) -> int:
        """Return the offset of `nbytes` contiguous free bytes."""
        assert nbytes <= self.largest
        begin = -(-self.end // ALIGNMENT) * ALIGNMENT
        if begin % self._capacity + nbytes > self._capacity:
            begin = -(-begin // self._capacity) * self._capacity
        self.end = begin + nbytes
        self.gone = max(0, self.end + 2 * self.largest + ALIGNMENT - self._capacity)  # at a wrap one may be left out
        self._head[0] = self.gone
        return begin % self._capacity


class RingReader:
    """A reader's end. It copies; nothing of the writer's memory is mapped."""

    def __init__(self, fd: int, reference: Reference) -> None:
        self._fd, self._capacity, self._token = fd, reference.nbytes, reference.token
        weakref.finalize(self, os.close, fd)

    @classmethod
    def open(cls, reference: Reference) -> RingReader | None:
        """Return a reader of the ring that a reference names, if that is within reach."""
        fd = open_memory(reference) if reference.nbytes >= SMALLEST else None
        if fd is None:
            return None
        reader = cls(fd, reference)
        return reader if reader._gone() is not None else None

    def read(self, spans: Sequence[Span]) -> list[memoryview] | None:
        """Return copies of what lies at some spans; None where any of it is gone, or was never there.

        Raises:
            WireError: a span reaches beyond the ring.
        """
        if any(position % self._capacity + nbytes > self._capacity for position, nbytes in spans):
            raise WireError(f"a span reaches beyond its ring of {self._capacity} bytes")
        copies = [np.empty(nbytes, np.uint8).data for _, nbytes in spans]
        try:
            for (position, _), copy in zip(spans, copies, strict=True):
                if os.preadv(self._fd, [copy], HEAD_BYTES + position % self._capacity) != len(copy):
                    return None
        except OSError:
            return None
        gone = self._gone()
        return copies if gone is not None and all(position >= gone for position, _ in spans) else None

    def _gone(self) -> int | None:
        """Return the position before which all is gone; None where it is not that ring."""
        try:
            magic, token, gone = HEAD.unpack(os.pread(self._fd, HEAD.size, 0))
        except (OSError, struct.error):
            return None
        return int(gone) if (magic, token) == (MAGIC, self._token) else None
