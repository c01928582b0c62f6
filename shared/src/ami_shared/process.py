"""What a process costs its machine."""

from __future__ import annotations

import time

import psutil

_process = psutil.Process()
_process.cpu_percent()
_started = time.monotonic()


def process_statistics() -> dict[str, float]:
    """Return this process's uptime in seconds, resident memory in bytes, CPU use in cores, and threads."""
    with _process.oneshot():
        return {
            "uptime_s": time.monotonic() - _started,
            "memory_bytes": _process.memory_info().rss,
            "cpu_cores": _process.cpu_percent() / 100.0,
            "threads": _process.num_threads(),
        }
