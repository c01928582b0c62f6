"""Scheduling priority of threads, depending on what the platform offers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from ami_shared.errors import ConfigurationError
from ami_shared.process import usable_cores

STRONG = ("realtime", "raised", "normal")
WEAK = ("normal", "nice", "idle")
REALTIME = 1  # of 1 to 99: ahead of all ordinary threads, behind whatever else in the system is real-time
RAISED, WEAKEST = -10, 19  # nice values


def set_thread_priority(level: str, also: Iterable[int] = ()) -> str:
    """Set the priority of the calling thread; return the one actually set.

    realtime  runs as soon as it is ready, ahead of all ordinary threads (SCHED_RR on Linux, which needs root or a limit
              rtprio of 1 or more); only where there is a second core for everyone else
    raised    a larger ordinary share (nice -10 on POSIX, which needs root; high on Windows)
    normal    unchanged
    nice      the weakest ordinary share (nice 19 on POSIX, below normal on Windows)
    idle      runs only when a core has nothing else to do (SCHED_IDLE on Linux, no privilege needed)

    A level that the platform does not offer or permit falls back to the next one towards normal. Threads and processes
    that the thread starts later have its priority too, except realtime. Where Linux schedules sessions as groups
    (autogroup), this process's group is made weak together with the thread.

    Args:
        also: ids of further threads of this process that get the same priority, such as those of a library's pool.
    """
    if level not in STRONG + WEAK:
        raise ConfigurationError(f"priority {level!r} is not one of {', '.join(dict.fromkeys(STRONG + WEAK))}")
    threads = (0, *also)
    if level in WEAK and level != "normal":
        _weaken_autogroup()
    if level == "realtime" and usable_cores() > 1 and _make_realtime(threads):
        return "realtime"
    if level in ("realtime", "raised") and _set_nice(RAISED, "HIGH_PRIORITY_CLASS", threads):
        return "raised"
    if level == "idle" and hasattr(os, "SCHED_IDLE") and _set_scheduler(os.SCHED_IDLE, 0, threads):
        return "idle"
    if level in ("idle", "nice") and _set_nice(WEAKEST, "BELOW_NORMAL_PRIORITY_CLASS", threads):
        return "nice"
    return "normal"


def thread_ids() -> frozenset[int]:
    """Return the ids of all threads of this process; none if the platform does not provide them."""
    try:
        return frozenset(int(task) for task in os.listdir("/proc/self/task"))
    except OSError:
        return frozenset()


def _weaken_autogroup() -> None:
    """Weaken the process's autogroup, only if it has a session to itself: others in a session must keep their share."""
    if hasattr(os, "getsid") and os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def _make_realtime(threads: Iterable[int]) -> bool:
    if not (hasattr(os, "SCHED_RR") and hasattr(os, "SCHED_RESET_ON_FORK")):
        return False
    import resource  # which Windows lacks

    if resource.getrlimit(resource.RLIMIT_RTTIME)[0] != resource.RLIM_INFINITY:
        return False  # the kernel ends a process that computes for longer than this
    return _set_scheduler(os.SCHED_RR | os.SCHED_RESET_ON_FORK, REALTIME, threads)


def _set_scheduler(policy: int, priority: int, threads: Iterable[int]) -> bool:
    try:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):  # it has ended by now
                os.sched_setscheduler(thread, policy, os.sched_param(priority))
    except OSError:
        return False
    return True


def _set_nice(nice: int, windows_class: str, threads: Iterable[int]) -> bool:
    try:
        if hasattr(os, "setpriority"):
            for thread in threads:
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, nice)
        else:
            import psutil

            psutil.Process().nice(getattr(psutil, windows_class))
    except (OSError, AttributeError):
        return False
    return True
