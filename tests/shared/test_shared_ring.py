"""A ring of bytes between real processes: a reader gets what was written, whole, or nothing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_shared import shared_memory
from ami_shared.errors import WireError
from ami_shared.shared_memory import Reference
from ami_shared.shared_ring import ALIGNMENT, Ring, RingReader, Span
from capabilities import sharing_memory

CAPACITY = 16 << 10


def reader_of(ring: Ring) -> RingReader:
    reference = ring.reference
    assert reference is not None
    reader = RingReader.open(reference)
    assert reader is not None
    return reader


@sharing_memory
@given(sizes=st.lists(st.tuples(st.integers(0, CAPACITY // 16), st.booleans()), max_size=80))
def test_whatever_is_written_is_read_back_until_it_is_gone(sizes: list[tuple[int, bool]]) -> None:
    ring, written = Ring(CAPACITY), list[tuple[Span, bytes]]()
    reader = reader_of(ring)
    for number, (size, in_place) in enumerate(sizes):
        content: bytes | memoryview = bytes([number % 251]) * size
        if in_place and size:
            room = ring.array((size,), np.uint8)
            room[:] = number % 251
            assert room.ctypes.data % ALIGNMENT == ring.array((0,), np.uint8).ctypes.data % ALIGNMENT == 0
            content = room.data
        written.append((ring.keep(content), bytes(content)))
        for span, expected in written:
            if span[0] >= ring.gone:
                assert ring.view(span) == expected
                assert reader.read([span]) == [expected]
            else:
                assert reader.read([span]) is None
    lasting = [(span, content) for span, content in written if span[0] >= ring.gone]
    assert reader.read([span for span, _ in lasting]) == [content for _, content in lasting]
    assert sum(len(content) for _, content in lasting) >= min(sum(size for size, _ in sizes), CAPACITY // 2)


@given(
    before=st.lists(st.integers(0, CAPACITY // 16), max_size=40),
    more=st.lists(st.lists(st.integers(0, CAPACITY // 16), max_size=5), max_size=20),
)
def test_what_is_left_in_the_ring_stays_as_it_is(before: list[int], more: list[list[int]]) -> None:
    ring = Ring(CAPACITY)
    for size in before:
        ring.keep(bytes(size))
    position = ring.end
    kept = ring.view(ring.keep(b"kept" * 64))
    assert ring.is_recent(position)
    for sizes in more:
        if not ring.leaves(position):
            assert not ring.is_recent(position)
            return
        room = ring.largest
        for size in sizes:
            size = min(size, room)
            room -= size
            ring.keep(b"x" * size)
        assert kept == b"kept" * 64


@sharing_memory
def test_arrays_have_their_dtype_and_shape_and_are_kept_where_they_lie() -> None:
    ring = Ring(CAPACITY)
    first, second = ring.array((4, 3), np.float32), ring.array((5,), np.int64)
    first[:], second[:] = 1.5, 7
    spans = [ring.keep(memoryview(array).cast("B")) for array in (first, second)]
    end = ring.end
    copies = reader_of(ring).read(spans)
    assert copies is not None
    assert np.array_equal(np.frombuffer(copies[0], np.float32).reshape(4, 3), first)
    assert np.array_equal(np.frombuffer(copies[1], np.int64), second)
    assert ring.end == end, "nothing was copied"
    assert spans[1][0] % ALIGNMENT == 0


WRITER = """
import sys
import numpy as np
from ami_shared.shared_ring import Ring
ring = Ring(1 << 20)
reference = ring.reference
print(reference.pid, reference.fd, reference.token.hex(), reference.nbytes, flush=True)
for number in range(1, 1 << 40):
    room = ring.array((12 << 10,), np.uint8)
    room[:] = number % 251
    position, nbytes = ring.keep(room.data)
    if number % 16 == 0:
        print(position, nbytes, number % 251, flush=True)
"""


class Writer:
    """A process that writes a ring as fast as it can."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
        pid, fd, token, nbytes = self.line()
        self.reference = Reference(int(pid), int(fd), bytes.fromhex(token), 0, int(nbytes))

    def line(self) -> list[str]:
        assert self._process.stdout
        return self._process.stdout.readline().split()

    def written(self) -> tuple[Span, int]:
        position, nbytes, value = map(int, self.line())
        return (position, nbytes), value

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        assert self._process.stdout
        self._process.stdout.close()


@pytest.fixture
def writer() -> Iterator[Writer]:
    made = Writer()
    yield made
    made.close()


@sharing_memory
def test_beside_a_writer_at_full_speed_nothing_torn_is_handed_on(writer: Writer) -> None:
    reader = RingReader.open(writer.reference)
    assert reader is not None
    whole = gone = 0
    deadline = time.monotonic() + 30.0
    while (whole < 200 or gone < 50) and time.monotonic() < deadline:
        span, value = writer.written()
        copies = reader.read([span])
        if copies is None:
            gone += 1
        else:
            assert (np.frombuffer(copies[0], np.uint8) == value).all()
            whole += 1
    assert whole, "it could be read"


@sharing_memory
def test_what_a_killed_writer_left_can_be_read_and_ends_with_the_reader(writer: Writer) -> None:
    reader = RingReader.open(writer.reference)
    assert reader is not None
    span, value = writer.written()
    os.kill(writer.reference.pid, signal.SIGSTOP)
    while reader.read([span]) is None:
        span, value = writer.written()
    writer.kill()
    assert RingReader.open(writer.reference) is None, "there is no such process any more"
    copies = reader.read([span])
    assert copies is not None
    assert (np.frombuffer(copies[0], np.uint8) == value).all()


@sharing_memory
def test_descriptors_are_given_back() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        ring = Ring(CAPACITY)
        reader = reader_of(ring)
    del ring, reader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@sharing_memory
def test_a_stranger_s_numbers_name_nothing() -> None:
    ring = Ring(CAPACITY)
    known = ring.reference
    assert known is not None
    piece = shared_memory.Piece(CAPACITY)
    assert piece.reference is not None
    for wrong in (
        replace(known, pid=2**22 + 1),
        replace(known, fd=100_000),
        replace(known, token=bytes(16)),
        replace(known, nbytes=known.nbytes * 2),
        replace(known, nbytes=0),
        piece.reference,
    ):
        assert RingReader.open(wrong) is None, wrong


@sharing_memory
def test_a_span_beyond_the_ring_is_refused_and_one_not_yet_written_is_no_crash() -> None:
    ring = Ring(CAPACITY)
    reader = reader_of(ring)
    for span in ((0, CAPACITY + 1), (CAPACITY - 1, 2), (10 * CAPACITY - 64, 65)):
        with pytest.raises(WireError, match="beyond"):
            reader.read([span])
    assert reader.read([(5 * CAPACITY, 8)]) == [bytes(8)]


def test_without_such_memory_it_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "can_share", lambda: False)
    ring = Ring(CAPACITY)
    assert ring.reference is None
    room = ring.array((8,), np.uint8)
    room[:] = 5
    assert ring.view(ring.keep(room.data)) == bytes([5]) * 8
    assert RingReader.open(Reference(os.getpid(), 0, bytes(16), 0, CAPACITY)) is None
