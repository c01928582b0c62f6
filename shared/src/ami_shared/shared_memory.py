"""Memory that processes of one host share: it has no name, so that no crash leaves anything behind.

A writer's pieces are anonymous files (memfd), which readers open through /proc. A reader holds a shared lock (flock)
on a piece while it uses it; a writer fills only pieces on which it gets an exclusive lock. So no reader ever sees a
piece that is being filled, and the kernel releases locks and memory with their last holder. On systems without such
files, or if the reader is on another host, in another container or of another user, nothing is shared, and callers do
without.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import struct
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ami_shared.errors import WireError
from ami_shared.wire import Array

HEAD = struct.Struct("<8s16sQ")  # magic, token of the piece, number of its filling
HEAD_BYTES = 64
MAGIC = b"AMI mem1"
NAME = "ami"
MOST_PIECES = 16
MOST_REMEMBERED = 64
PAGE = mmap.PAGESIZE


@cache
def can_share() -> bool:
    """Return whether this system offers anonymous shared memory to this process."""
    try:
        os.close(os.memfd_create(NAME))
    except (AttributeError, OSError):
        return False
    return os.path.isdir("/proc/self/fd")


def make_memory(nbytes: int) -> tuple[int, mmap.mmap]:
    """Return anonymous memory, all zeros: its descriptor, which the caller closes, and the memory itself.

    Raises:
        OSError: there is none left.
    """
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
        return fd, mmap.mmap(fd, nbytes)
    except OSError:
        os.close(fd)
        raise


@dataclass(frozen=True)
class Reference:
    """Where a reader on the same host finds one filling of one piece.

    Attributes:
        pid, fd: the writer's process and its descriptor.
        token: random identity of the piece; on another host the same pid and fd belong to something else.
        filling: how often the piece has been filled; 0 for a ring (shared_ring.py), which is filled continuously.
        nbytes: size of the content.
    """

    pid: int
    fd: int
    token: bytes
    filling: int
    nbytes: int

    @property
    def path(self) -> str:
        """Path of the writer's descriptor."""
        return f"/proc/{self.pid}/fd/{self.fd}"

    def to_list(self) -> list[Any]:
        """Return the list that from_list() reads back."""
        return [self.pid, self.fd, self.token.hex(), self.filling, self.nbytes]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Reference:
        """Parse a reference; raise WireError if it is malformed."""
        match values:
            case [int(pid), int(fd), str(token), int(filling), int(nbytes)] if (
                re.fullmatch("[0-9a-f]{32}", token)
                and pid > 0
                and fd >= 0
                and 0 <= filling < 1 << 63
                and 0 <= nbytes < 1 << 48
            ):
                return cls(pid, fd, bytes.fromhex(token), filling, nbytes)
        raise WireError("a reference to memory is not [pid, fd, token, filling, nbytes]")


class Piece:
    """Memory that is filled repeatedly; shared with other processes if the system supports that.

    Attributes:
        content: (nbytes,) uint8; may be written only between lock() and unlock().
    """

    def __init__(self, nbytes: int, shared: bool = True) -> None:
        """Allocate the memory.

        Raises:
            OSError: there is no memory left.
        """
        self._token, self._filling, self._fd = secrets.token_bytes(16), 0, -1
        if not shared or not can_share():
            self.content: Array = np.zeros(nbytes, np.uint8)
            return
        self._fd, memory = make_memory(HEAD_BYTES + nbytes)
        weakref.finalize(self, os.close, self._fd)
        whole = np.frombuffer(memory, np.uint8)
        self._head, self.content = whole[:HEAD_BYTES], whole[HEAD_BYTES:]

    def lock(self) -> bool:
        """Lock readers out; return False if one is reading."""
        if self._fd < 0:
            return True
        if not _flock(self._fd, alone=True):
            return False
        self._filling += 1
        self._head[: HEAD.size] = np.frombuffer(HEAD.pack(MAGIC, self._token, self._filling), np.uint8)
        return True

    def unlock(self) -> None:
        """Let readers in: what was filled stays as it is until the next lock()."""
        if self._fd >= 0:
            _unlock(self._fd)

    @property
    def reference(self) -> Reference | None:
        """What readers need to find the present filling; None if it cannot be shared."""
        if self._fd < 0:
            return None
        return Reference(os.getpid(), self._fd, self._token, self._filling, len(self.content))


class Pool:
    """Pieces of one size; there are more of them while readers hold on to old ones.

    If readers hold on to MOST_PIECES, the next is not shared: its content has to be sent.
    """

    def __init__(self, nbytes: int, prepare: Callable[[Array], None] = lambda content: None) -> None:
        """Start without pieces; they are made when needed.

        Args:
            nbytes: size of each piece.
            prepare: called once with the content of each new piece that will be reused.
        """
        self._nbytes, self._prepare = nbytes, prepare
        self._idle: list[Piece] = []
        self.made = 0

    def take(self) -> Piece:
        """Return a locked piece, to be filled; not a shared one if no descriptor or memory is left for that."""
        for piece in self._idle:
            if piece.lock():
                self._idle.remove(piece)
                return piece
        shared = self.made < MOST_PIECES
        try:
            piece = Piece(self._nbytes, shared)
        except OSError:
            shared, piece = False, Piece(self._nbytes, False)
        if self._keeps(piece):
            self._prepare(piece.content)
        piece.lock()
        self.made += shared
        return piece

    def give_back(self, piece: Piece) -> None:
        """Let a piece be filled again, once nobody reads it any more."""
        piece.unlock()
        if self._keeps(piece):
            self._idle.append(piece)

    @staticmethod
    def _keeps(piece: Piece) -> bool:
        """Return whether to reuse a piece: one that is not shared only if the system can share none."""
        return piece.reference is not None or not can_share()


class Reader:
    """Reads other processes' pieces. Keeps their mappings, since mapping memory takes time."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, _Mapped] = OrderedDict()

    def look(self, reference: Reference) -> Array | None:
        """Return a filling's content, (nbytes,) uint8; None if it is out of reach or has been replaced.

        It stays unchanged for as long as the array or a view of it lives. It must not be written to.
        """
        mapped = self._known.get(reference.token)
        if mapped is None:
            self._forget_the_dead()
            mapped = _map(reference)
        content = mapped.content(reference) if mapped else None
        if mapped is None or content is None:
            self._known.pop(reference.token, None)
            return None
        self._known[reference.token] = mapped
        self._known.move_to_end(reference.token)
        while len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)
        return content

    def _forget_the_dead(self) -> None:
        """Release memory whose writer is gone."""
        self._known = OrderedDict((token, mapped) for token, mapped in self._known.items() if not mapped.abandoned)


class _Mapped:
    """One piece in this process's address space, locked while any array of it lives."""

    def __init__(self, fd: int, memory: mmap.mmap, source: str) -> None:
        """Take over the mapping of a piece.

        Args:
            fd: own descriptor of the memory, closed when this object is deleted.
            memory: the mapping.
            source: path of the writer's descriptor.
        """
        self._fd, self._memory, self._source, self._users = fd, memory, source, 0
        self._using = threading.RLock()  # arrays are finalised in any thread, even while this one holds the lock
        weakref.finalize(self, os.close, fd)

    def content(self, reference: Reference) -> Array | None:
        """Return its content if the filling is the right one; the lock is held until the last such array is gone."""
        with self._using:
            self._users += 1  # first: any allocation from here on may finalise older arrays of it
            if self._users == 1 and not _flock(self._fd, alone=False):
                self._users = 0
                return None
            if HEAD.unpack_from(self._memory) != (MAGIC, reference.token, reference.filling):
                self._dropped()
                return None
            content = np.frombuffer(self._memory, np.uint8, offset=HEAD_BYTES)
        weakref.finalize(content, self._dropped)  # views keep `content` alive
        return content

    @property
    def abandoned(self) -> bool:
        """Return whether its writer has closed it, or is gone."""
        return not os.path.lexists(self._source)

    def _dropped(self) -> None:
        with self._using:
            self._users -= 1
            if not self._users:
                _unlock(self._fd)


def open_memory(reference: Reference) -> int | None:
    """Return a descriptor, which the caller closes, of the referenced memory; None if that is out of reach."""
    if not can_share():
        return None
    try:
        fd = os.open(reference.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        named = os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{NAME}")
        if named and os.fstat(fd).st_size == HEAD_BYTES + reference.nbytes:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _map(reference: Reference) -> _Mapped | None:
    """Return the referenced piece; None if it is out of reach."""
    fd = open_memory(reference)
    if fd is None:
        return None
    nbytes = HEAD_BYTES + reference.nbytes
    try:
        memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError):
        os.close(fd)
        return None
    np.frombuffer(memory, np.uint8)[::PAGE].sum()  # faults the pages in now, before time matters
    return _Mapped(fd, memory, reference.path)


if sys.platform != "win32":
    import fcntl

    def _flock(fd: int, alone: bool) -> bool:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _unlock(fd: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
