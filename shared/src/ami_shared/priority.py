"""Scheduling priority of threads, depending on what the platform offers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from ami_shared.errors import ConfigurationError

LEVELS = ("normal", "nice", "idle")


def set_thread_priority(level: str, also: Iterable[int] = ()) -> str:
    """Set the priority of the calling thread (and of threads it starts later); return the one actually set.

    idle    runs only when a core has nothing else to do (SCHED_IDLE on Linux, no privilege needed)
    nice    the weakest ordinary share (nice 19 on POSIX, below normal on Windows)
    normal  unchanged

    A level that the platform does not offer falls back to the next one. Where Linux schedules sessions as groups
    (autogroup), this process's group is made weak as well.

    Args:
        also: ids of further threads of this process that get the same priority, such as those of a library's pool.
    """
    if level not in LEVELS:
        raise ConfigurationError(f"priority {level!r} is not one of {', '.join(LEVELS)}")
    if level != "normal":
        _weaken_autogroup()
    if level == "idle" and hasattr(os, "SCHED_IDLE"):
        try:
            for thread in (0, *also):
                with contextlib.suppress(ProcessLookupError):  # it has ended by now
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            return "idle"
        except OSError:
            level = "nice"
    if level in ("idle", "nice") and _make_nice(also):
        return "nice"
    return "normal"


def _weaken_autogroup() -> None:
    """Weaken the process's autogroup, only if it has a session to itself: others in a session must keep their share."""
    if hasattr(os, "getsid") and os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def thread_ids() -> frozenset[int]:
    """Return the ids of all threads of this process; none if the platform does not provide them."""
    try:
        return frozenset(int(task) for task in os.listdir("/proc/self/task"))
    except OSError:
        return frozenset()


def _make_nice(also: Iterable[int]) -> bool:
    try:
        if hasattr(os, "setpriority"):
            for thread in (0, *also):
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, 19)
        else:
            import psutil

            psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)  # type: ignore[attr-defined,unused-ignore]
    except (OSError, AttributeError):
        return False
    return True
