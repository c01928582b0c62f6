"""What a process takes of what it may not take more and more of."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil


def taken_by(pid: int) -> dict[str, float]:
    """Return what a process takes of what it may not take more and more of; nothing of one that has just ended.

    Memory that it shares is not counted, where the system tells: a ring of experience fills up for minutes.
    """
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        seen = psutil.Process(pid)
        with seen.oneshot():
            memory = seen.memory_info()
            own = memory.rss - getattr(memory, "shared", 0)
            taken = {"memory, MB": own / 1e6, "threads": float(seen.num_threads())}
        folder = Path(f"/proc/{pid}/fd")
        if folder.is_dir():
            targets = [readlink(descriptor) for descriptor in folder.iterdir()]
            taken["descriptors"] = float(len(targets))
            taken["shared memory"] = float(sum("memfd:" in target for target in targets))
        return taken
    return {}


def taken_by_family(pid: int) -> dict[str, float]:
    """Return what a process and all that it has started take together."""
    taken: Counter[str] = Counter()
    with suppress(psutil.NoSuchProcess):
        for member in (process := psutil.Process(pid), *process.children(recursive=True)):
            taken.update(taken_by(member.pid))
    return dict(taken)


def readlink(descriptor: Path) -> str:
    """Return what a descriptor is of; nothing where it has just been closed."""
    with suppress(OSError):
        return str(descriptor.readlink())
    return ""
