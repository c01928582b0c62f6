"""Reading pipes, as on POSIX and as on Windows."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ami_shared import process
from ami_shared.process import read_pipe, usable_cores


def test_a_pipe_is_read_to_its_end() -> None:
    inward, outward = os.pipe()
    os.write(outward, b"word")
    assert read_pipe(inward) == b"word"
    os.close(outward)
    assert read_pipe(inward) == b""
    os.close(inward)


def test_on_windows_no_read_is_pending_while_there_are_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pending one would hold up numpy's import, and so the start of every service of `ami up`."""
    waiting = [0, 0, 4]

    def peek(handle: int, size: int) -> tuple[int, int]:
        assert (handle, size) == (70, 0)
        if not waiting:
            raise BrokenPipeError
        return waiting.pop(0), 0

    def read(descriptor: int, nbytes: int) -> bytes:
        assert not waiting, "before there are bytes"
        return b"word"

    monkeypatch.setitem(sys.modules, "_winapi", SimpleNamespace(PeekNamedPipe=peek))
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda descriptor: 70 + descriptor))
    monkeypatch.setattr(process, "os", SimpleNamespace(name="nt", read=read))
    assert read_pipe(0) == b"word"
    assert read_pipe(0) == b"", "at the end of the pipe"


def test_what_is_no_pipe_on_windows_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def peek(handle: int, size: int) -> tuple[int, int]:
        raise OSError(1, "incorrect function")

    monkeypatch.setitem(sys.modules, "_winapi", SimpleNamespace(PeekNamedPipe=peek))
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda descriptor: descriptor))
    monkeypatch.setattr(process, "os", SimpleNamespace(name="nt", read=lambda descriptor, nbytes: b"typed"))
    assert read_pipe(0) == b"typed"


def test_on_windows_the_end_asks_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[int, int]] = []
    kernel32 = SimpleNamespace(TerminateProcess=lambda handle, code: ended.append((handle.value, code)))
    fake = SimpleNamespace(windll=SimpleNamespace(kernel32=kernel32), c_void_p=ctypes.c_void_p)
    monkeypatch.setitem(sys.modules, "ctypes", fake)
    monkeypatch.setattr(process, "os", SimpleNamespace(name="nt", _exit=lambda code: ended.append((0, code))))
    process.end_at_once(3)
    assert ended == [(ctypes.c_void_p(-1).value, 3), (0, 3)]


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("", 8)]
)
def test_usable_are_the_cores_of_the_affinity_within_the_quota(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(process, "QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores() == cores
    monkeypatch.setattr(process, "QUOTA", str(tmp_path / "nothing"))
    assert usable_cores() == 8
