"""Metrics on their way out of a service: a bounded queue that never blocks, oldest dropped first and counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ami_shared import limits
from ami_shared.clock import Clock, SystemClock
from ami_shared.wire import Array


@dataclass(frozen=True)
class Picture:
    """An image for the learning record: RGB uint8 of shape (H, W, 3)."""

    name: str
    step: int
    pixels: Array


class MetricsQueue:
    """Where the loops put their metrics, and the control link takes them from. Safe between threads."""

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
        """Queue a picture."""
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
