"""Memory that processes of one host share: without names, so that no death leaves anything behind.

A writer's pieces are anonymous files (memfd), which readers open through /proc. A reader holds a shared lock (flock)
on a piece for as long as it looks at it; a writer fills only pieces that it can lock alone. So nobody ever sees a piece
that is being filled, and the kernel ends locks and memory with their last holder. Where the system has no such files,
or the reader is on another host, in another container or of another user, there is nothing to share: callers go on
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
    """Tell whether this system has memory that is shared without a name, and lets us have it."""
    try:
        os.close(os.memfd_create(NAME))
    except (AttributeError, OSError):
        return False
    return os.path.isdir("/proc/self/fd")


def make_memory(nbytes: int) -> tuple[int, mmap.mmap]:
    """Return memory without a name, all zeros: its descriptor, which the caller closes, and the memory itself.

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
        token: random identity of the piece; on another host the same numbers are somebody else's.
        filling: counts how often the piece was filled; 0 for a ring (shared_ring.py), which is filled on and on.
        nbytes: of content.
    """

    pid: int
    fd: int
    token: bytes
    filling: int
    nbytes: int

    @property
    def path(self) -> str:
        """Where the writer's descriptor is found."""
        return f"/proc/{self.pid}/fd/{self.fd}"

    def to_list(self) -> list[Any]:
        """Return the list that from_list() reads back."""
        return [self.pid, self.fd, self.token.hex(), self.filling, self.nbytes]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Reference:
        """Read a reference; raise WireError where something is off."""
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
    """Memory to be filled again and again; shared with other processes where the system can do that.

    Attributes:
        content: (nbytes,) uint8; to be written only between lock() and unlock().
    """

    def __init__(self, nbytes: int, shared: bool = True) -> None:
        """Raises:
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
        """Keep readers out; return False where one is looking."""
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
        """What readers need to find the present filling; None where it cannot be shared."""
        if self._fd < 0:
            return None
        return Reference(os.getpid(), self._fd, self._token, self._filling, len(self.content))


class Pool:
    """Pieces of one size. There are more of them where readers hold on to old ones.

    If they hold on to MOST_PIECES, the next is not shared: what is filled into it has to be sent.
    """

    def __init__(self, nbytes: int, prepare: Callable[[Array], None] = lambda content: None) -> None:
        """Args:
        prepare: called once with the content of each new piece that is kept.
        """
        self._nbytes, self._prepare = nbytes, prepare
        self._idle: list[Piece] = []
        self.made = 0

    def take(self) -> Piece:
        """Return a locked piece, to be filled; not a shared one where no descriptor or memory is left for that."""
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
        """Let a piece be filled anew, once nobody looks at it any more."""
        piece.unlock()
        if self._keeps(piece):
            self._idle.append(piece)

    @staticmethod
    def _keeps(piece: Piece) -> bool:
        """Whether a piece is filled again: of those that cannot be shared only where none can be."""
        return piece.reference is not None or not can_share()


class Reader:
    """Looks at other processes' pieces. Remembers how it got at them, since mapping memory takes time."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, _Mapped] = OrderedDict()

    def look(self, reference: Reference) -> Array | None:
        """Return a filling's content, (nbytes,) uint8; None where it cannot be had here, or not any more.

        It stays as it is for as long as the array or a view of it lives. It must not be written to.
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
        """Let go of memory whose writer is gone: nothing will come of it any more."""
        self._known = OrderedDict((token, mapped) for token, mapped in self._known.items() if not mapped.abandoned)


class _Mapped:
    """One piece in this process's address space, locked while any array of it lives."""

    def __init__(self, fd: int, memory: mmap.mmap, source: str) -> None:
        """Args:
        source: path by which the writer's descriptor is reached.
        """
        self._fd, self._memory, self._source, self._users = fd, memory, source, 0
        self._using = threading.RLock()  # arrays die in any thread, and also while this one holds it
        weakref.finalize(self, os.close, fd)

    def content(self, reference: Reference) -> Array | None:
        """Return an array of it, if it is the filling meant; the lock is kept until the last one is gone."""
        with self._using:
            self._users += 1  # first of all: whatever is allocated from here on may let older arrays of it die
            if self._users == 1 and not _flock(self._fd, alone=False):
                self._users = 0
                return None
            if HEAD.unpack_from(self._memory) != (MAGIC, reference.token, reference.filling):
                self._dropped()
                return None
            content = np.frombuffer(self._memory, np.uint8, offset=HEAD_BYTES)
        weakref.finalize(content, self._dropped)  # it is what views of it keep alive
        return content

    @property
    def abandoned(self) -> bool:
        """Whether its writer has closed it, or is gone."""
        return not os.path.lexists(self._source)

    def _dropped(self) -> None:
        with self._using:
            self._users -= 1
            if not self._users:
                _unlock(self._fd)


def open_memory(reference: Reference) -> int | None:
    """Return a descriptor, which the caller closes, of the memory that a reference names, if that is within reach."""
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
    """Return the piece that the reference names, if it is within reach."""
    fd = open_memory(reference)
    if fd is None:
        return None
    nbytes = HEAD_BYTES + reference.nbytes
    try:
        memory = mmap.mmap(fd, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError):
        os.close(fd)
        return None
    np.frombuffer(memory, np.uint8)[::PAGE].sum()  # has the pages at hand before anybody is in a hurry
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
