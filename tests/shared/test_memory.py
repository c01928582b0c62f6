from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from ami_shared import memory

COUNT_FAULTS = """
import sys, resource, threading
from ami_shared.memory import keep_freed_memory
how, where = sys.argv[1:]
if how == "keep":
    assert keep_freed_memory()
import torch
def gradient_step():
    torch.ones(20_000_000)
def snapshot_in_parts():
    parts = [bytearray(8 << 20) for _ in range(16)]
def work():
    global before
    for n in range(30):
        snapshot_in_parts() if where == "thread" else gradient_step()
        if n == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if where == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, where: str) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS, how, where]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_used_again_with_far_fewer_page_faults(where: str) -> None:
    assert 2 * faults("keep", where) < faults("give back", where)


def test_a_c_library_without_the_option_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherLibrary:
        def __init__(self, name: None) -> None:
            pass

    monkeypatch.setattr(memory.ctypes, "CDLL", OtherLibrary)  # type: ignore[attr-defined]
    assert not memory.keep_freed_memory()
