"""Metrics to be sent by a service: a bounded queue that never blocks; the oldest are dropped first, and counted.

The numbers that `ami status` shows of a service become curves too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ami_shared import limits
from ami_shared.clock import Clock, Every, SystemClock
from ami_shared.wire import Array

NO_CURVES = {"uptime_s", "since_s", "loop_age_s"}  # these only reflect the time


def curves(statistics: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers of a service's statistics by name; those in nested maps as name/name."""
    found: dict[str, float] = {}
    for name, value in statistics.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in curves(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in NO_CURVES:
            found[str(name)] = float(value)
    return found


class Curves:
    """Points of the curves of a service's statistics: at intervals, and only of values that have changed."""

    def __init__(self) -> None:
        self._due = Every(limits.STATISTICS_INTERVAL)
        self._told: dict[str, float] = {}

    def due(self, now: float) -> bool:
        """Whether it is time for new points, by a monotonic clock."""
        return self._due.due(now)

    def changed(self, statistics: Mapping[str, Any]) -> dict[str, float]:
        """Return points of the values that have changed since the last call."""
        before, self._told = self._told, curves(statistics)
        return {name: value for name, value in self._told.items() if before.get(name) != value}


@dataclass(frozen=True)
class Picture:
    """An image for the learning record: RGB uint8 of shape (H, W, 3)."""

    name: str
    step: int
    pixels: Array


class MetricsQueue:
    """Where the loops put their metrics and the control link takes them. Thread-safe."""

    def __init__(self, capacity: int = limits.METRICS_QUEUE, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._points: deque[tuple[str, float, int, float]] = deque(maxlen=capacity)
        self._pictures: deque[Picture] = deque(maxlen=4)
        self._lock = threading.Lock()
        self.dropped = 0

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Queue one value for each name at a step."""
        now = self._clock.time()
        with self._lock:
            for name, value in values.items():
                self.dropped += len(self._points) == self._points.maxlen
                self._points.append((name, float(value), step, now))

    def put_picture(self, picture: Picture) -> None:
        """Queue a picture; one with sides longer than a message may hold is subsampled."""
        if (step := -(-max(picture.pixels.shape) // limits.MAX_PICTURE_SIDE)) > 1:
            picture = replace(picture, pixels=picture.pixels[::step, ::step])
        with self._lock:
            self.dropped += len(self._pictures) == self._pictures.maxlen
            self._pictures.append(picture)

    def take(self, at_most: int = 1_000) -> list[tuple[str, float, int, float]]:
        """Take the oldest points: (name, value, step, seconds since the epoch)."""
        with self._lock:
            return [self._points.popleft() for _ in range(min(at_most, len(self._points)))]

    def take_picture(self) -> Picture | None:
        """Take the oldest picture."""
        with self._lock:
            return self._pictures.popleft() if self._pictures else None
