from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from ami_shared import memory

COUNT_FAULTS = """
import sys, resource
from ami_shared.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
for n in range(30):
    torch.ones(20_000_000)
    if n == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_freed_memory_is_used_again_with_far_fewer_page_faults() -> None:
    assert 2 * faults("keep") < faults("give back")


def test_a_c_library_without_the_option_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherLibrary:
        def __init__(self, name: None) -> None:
            pass

    monkeypatch.setattr(memory.ctypes, "CDLL", OtherLibrary)  # type: ignore[attr-defined]
    assert not memory.keep_freed_memory()
