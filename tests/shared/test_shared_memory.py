"""Memory shared between real processes: found, locked, and let go of however anybody dies."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ami_shared import shared_memory
from ami_shared.errors import WireError
from ami_shared.shared_memory import MOST_PIECES, Piece, Pool, Reader, Reference
from capabilities import sharing_memory

READER = """
import sys
from ami_shared.shared_memory import Reader, Reference
held, reader = [], Reader()
for line in sys.stdin:
    pid, fd, token, filling, nbytes = line.split()
    content = reader.look(Reference(int(pid), int(fd), bytes.fromhex(token), int(filling), int(nbytes)))
    held = [] if content is None else [content[:8].view("float64")]
    print("gone" if content is None else int(held[0][0]), flush=True)
    content = None
"""


class OtherProcess:
    """A reader in a process of its own: it holds on to what it saw last."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def look(self, reference: Reference) -> str:
        assert self._process.stdin
        assert self._process.stdout
        words = (reference.pid, reference.fd, reference.token.hex(), reference.filling, reference.nbytes)
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        with self._process:
            self._process.kill()


@pytest.fixture
def other() -> Iterator[OtherProcess]:
    made = OtherProcess()
    yield made
    made.kill()


def filled(pool: Pool, value: float) -> Piece:
    piece = pool.take()
    piece.content.view(np.float64)[:] = value
    piece.unlock()
    return piece


def reference_of(piece: Piece) -> Reference:
    reference = piece.reference
    assert reference is not None
    return reference


@sharing_memory
def test_another_process_sees_what_was_filled(other: OtherProcess) -> None:
    piece = filled(Pool(8_000), 17.0)
    assert other.look(reference_of(piece)) == "17"


@sharing_memory
def test_a_piece_is_not_filled_while_anybody_looks_at_it_and_is_again_when_that_one_was_killed(
    other: OtherProcess,
) -> None:
    pool = Pool(8_000)
    piece = filled(pool, 1.0)
    assert other.look(reference_of(piece)) == "1"
    pool.give_back(piece)
    second = filled(pool, 2.0)
    assert second is not piece
    other.kill()
    assert pool.take() is piece
    assert pool.made == 2


@sharing_memory
def test_a_piece_that_is_being_filled_is_out_of_reach_and_an_older_filling_is_gone(other: OtherProcess) -> None:
    pool = Pool(8_000)
    piece = filled(pool, 1.0)
    first = reference_of(piece)
    assert piece.lock()
    assert other.look(reference_of(piece)) == "gone"
    piece.content.view(np.float64)[:] = 2.0
    piece.unlock()
    assert other.look(first) == "gone"
    assert other.look(reference_of(piece)) == "2"


@sharing_memory
def test_what_a_reader_holds_outlives_the_writer() -> None:
    piece = filled(Pool(8_000), 5.0)
    content = Reader().look(reference_of(piece))
    assert content is not None
    part = content[800:1600].view(np.float64)
    del piece, content
    gc.collect()
    assert (part == 5.0).all()


@sharing_memory
def test_a_reader_lets_go_with_the_last_view_and_looks_again_at_the_same_memory() -> None:
    pool, reader = Pool(80_000), Reader()
    for value in range(5):
        piece = filled(pool, float(value))
        content = reader.look(reference_of(piece))
        assert content is not None
        view = content[8:800].view(np.float64)
        del content
        assert not piece.lock(), "a view of it lives"
        assert (view == value).all()
        del view
        pool.give_back(piece)
    assert pool.made == 1


@sharing_memory
def test_pieces_are_bounded_whatever_readers_hold() -> None:
    pool, reader, held = Pool(64), Reader(), []
    while reference := (piece := filled(pool, 0.0)).reference:
        held.append(reader.look(reference))
        pool.give_back(piece)
    assert pool.made == len(held) == MOST_PIECES
    pool.give_back(piece)
    held.pop()
    assert pool.take().reference is not None


@sharing_memory
def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        reader, piece = Reader(), filled(Pool(64), 1.0)
        assert reader.look(reference_of(piece)) is not None
    del reader, piece
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@sharing_memory
def test_a_stranger_s_numbers_name_nothing() -> None:
    piece = filled(Pool(64), 1.0)
    known = reference_of(piece)
    reader, pipe = Reader(), os.pipe()
    with open(os.devnull) as other_file:
        for wrong in (
            replace(known, pid=2**22 + 1),
            replace(known, fd=100_000),
            replace(known, fd=pipe[0]),
            replace(known, fd=other_file.fileno()),
            replace(known, token=bytes(16)),
            replace(known, filling=known.filling + 1),
            replace(known, nbytes=known.nbytes * 2),
        ):
            assert reader.look(wrong) is None, wrong
    assert reader.look(known) is not None
    for end in pipe:
        os.close(end)


@sharing_memory
def test_where_no_descriptor_is_left_pieces_are_private_until_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(nbytes: int) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    pool = Pool(64)
    with monkeypatch.context() as patched:
        patched.setattr(shared_memory, "make_memory", refused)
        piece = filled(pool, 3.0)
        assert piece.reference is None
        pool.give_back(piece)
    assert pool.made == 0
    assert pool.take().reference is not None


@sharing_memory
def test_a_view_that_dies_in_the_middle_of_another_look_does_not_let_the_writer_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    piece = filled(Pool(8_000), 1.0)
    reader, reference = Reader(), reference_of(piece)
    held = [reader.look(reference)]

    class Collecting:
        """A head whose reading lets the garbage collector free the older view."""

        size, pack = shared_memory.HEAD.size, shared_memory.HEAD.pack
        read = staticmethod(shared_memory.HEAD.unpack_from)

        def unpack_from(self, memory: Any) -> Any:
            held.clear()
            return self.read(memory)

    monkeypatch.setattr(shared_memory, "HEAD", Collecting())
    content = reader.look(reference)
    assert content is not None
    assert not held
    assert not piece.lock(), "somebody looks at it"
    del content
    assert piece.lock()


def test_without_such_memory_pieces_are_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "can_share", lambda: False)
    pool = Pool(64)
    piece = filled(pool, 3.0)
    assert piece.reference is None
    pool.give_back(piece)
    assert pool.take() is piece
    assert Reader().look(Reference(os.getpid(), 0, bytes(16), 1, 64)) is None


TOKEN = "5a" * 16


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1, 2, TOKEN, 3],
        [0, 2, TOKEN, 3, 4],
        [1, -1, TOKEN, 3, 4],
        [1, 2, "5a", 3, 4],
        [1, 2, "xy" * 16, 3, 4],
        [1, 2, bytes(16), 3, 4],
        ["1", 2, TOKEN, 3, 4],
        [1, 2, TOKEN, 3, 1 << 60],
    ],
)
def test_a_malformed_reference_is_refused(values: list[object]) -> None:
    with pytest.raises(WireError):
        Reference.from_list(values)


def test_a_reference_survives_its_way() -> None:
    reference = Reference(12, 3, bytes(range(16)), 7, 4096)
    assert Reference.from_list(reference.to_list()) == reference


WRITER = """
import sys
from ami_shared.shared_memory import Piece
piece = Piece(64)
piece.lock()
piece.unlock()
print(*piece.reference.to_list(), flush=True)
sys.stdin.read()
"""


@sharing_memory
def test_the_memory_of_writers_that_died_is_let_go_of_with_the_next_one() -> None:
    def memory_held() -> int:
        gc.collect()
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith("/memfd:") for link in links if os.path.lexists(link))

    before, reader = memory_held(), Reader()
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout
            pid, fd, token, filling, nbytes = writer.stdout.readline().split()
            reference = Reference(int(pid), int(fd), bytes.fromhex(token), int(filling), int(nbytes))
            assert reader.look(reference) is not None
            writer.kill()
    assert memory_held() == before + 2, "of the last one: its own descriptor, and that of its mapping"


@sharing_memory
def test_a_look_while_the_last_view_dies_elsewhere_keeps_the_writer_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    piece = filled(Pool(8_000), 1.0)
    reader, reference = Reader(), piece.reference
    assert reference is not None
    first = reader.look(reference)
    (mapped,) = reader._known.values()
    looked: list[Any] = []
    looking = threading.Thread(target=lambda: looked.append(reader.look(reference)))
    unlock = shared_memory._unlock

    def slowly(fd: int) -> None:
        if fd == mapped._fd and not looking.ident:
            looking.start()  # the other thread's look falls between the last view's end and the unlocking
            looking.join(0.3)
        unlock(fd)

    monkeypatch.setattr(shared_memory, "_unlock", slowly)
    del first
    looking.join(5.0)
    assert looked[0] is not None
    assert not piece.lock(), "somebody looks at it"
    looked.clear()
    assert piece.lock()
