"""What a process costs its machine, and how it deals with its children: signals, pipes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil

from ami_shared.clock import Rate

QUOTA = "/sys/fs/cgroup/cpu.max"  # microseconds of all cores, and in which time: of control groups, version 2
PIPE_BYTES, PIPE_POLL_S = 1 << 16, 0.02

_process = psutil.Process()
_started = time.monotonic()
_cpu_seconds = Rate()


def own_group() -> dict[str, Any]:
    """Return the options of subprocess.Popen() that keep a terminal's Ctrl-C, and its closing, from the process.

    A new session would do that too, but Linux schedules sessions as groups, and a trainer's idle priority would then
    have no effect relative to the body's group. On Windows the process gets a hidden console of its own.
    """
    if os.name == "nt":
        names = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
        return {"creationflags": sum(getattr(subprocess, name, 0) for name in names)}
    return {"process_group": 0}


def usable_cores() -> int:
    """Return how many cores this process may keep busy: of the machine, its affinity, or a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = map(int, Path(QUOTA).read_text().split())  # "max 100000" is no number: no quota
        cores = min(cores, max(1, quota // period))
    return cores


def read_pipe(descriptor: int) -> bytes:
    """Wait for the next bytes of a pipe, and return them; empty at its end.

    On Windows no read is begun before there are bytes: while one is pending, whatever else asks about the pipe waits,
    as numpy asks about standard input when it is imported (numpy issue 24290).
    """
    try:
        if os.name == "nt":
            _wait_for_bytes(descriptor)
        return os.read(descriptor, PIPE_BYTES)
    except BrokenPipeError:
        return b""


def _wait_for_bytes(descriptor: int) -> None:
    """Wait until a pipe of Windows has bytes, if it is one; raise BrokenPipeError at its end."""
    import _winapi
    import msvcrt

    handle = msvcrt.get_osfhandle(descriptor)  # type: ignore[attr-defined]
    try:
        while not _winapi.PeekNamedPipe(handle, 0)[0]:  # type: ignore[attr-defined]
            time.sleep(PIPE_POLL_S)
    except BrokenPipeError:
        raise
    except OSError:
        pass  # a terminal or a file


def end_at_once(code: int) -> NoReturn:
    """End this process without waiting for anything in it.

    On Windows the ordinary way calls into every library first, which a camera's driver that hangs may block.
    """
    if os.name == "nt":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            this_process = ctypes.c_void_p(-1)
            ctypes.windll.kernel32.TerminateProcess(this_process, code)  # type: ignore[attr-defined]
    os._exit(code)


def memory_of(pid: int) -> int:
    """Return the resident memory of a process in bytes, 0 if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def process_statistics() -> dict[str, float]:
    """Return this process's uptime in seconds, resident memory in bytes, CPU use in cores, and threads."""
    now = time.monotonic()
    with _process.oneshot():
        spent = _process.cpu_times()
        return {
            "uptime_s": now - _started,
            "memory_bytes": _process.memory_info().rss,
            "cpu_cores": _cpu_seconds.update(now, spent.user + spent.system),
            "threads": _process.num_threads(),
        }
