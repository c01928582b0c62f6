"""Keeps freed memory in the process.

A gradient step allocates and frees the same large tensors again and again, and a stream its messages. By default glibc
gives each of them back to the system, which has to fill every page with zeros the next time: a quarter of the time of a
gradient step on a CPU, and most of the time that it takes to receive a large snapshot.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = (1 << 31) - 1
ARENA_BYTES = 64 << 20  # of which a thread's arena consists; with less padding it gives back those that are free


def keep_freed_memory() -> bool:
    """Let allocations be served from memory freed before; return whether this C library can do that.

    This covers allocations of up to 2 GiB in a process's first thread, and up to 64 MiB (glibc's arenas) in others.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; TypeError: Windows has no library without a name
        return False
    keeping = ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, ARENA_BYTES))
    return all(mallopt(option, value) for option, value in keeping)
