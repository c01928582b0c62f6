"""When the next tic is due, which tics show a frame, and the actual rate of tics. Pure: times are arguments.

The grid is absolute: tic k is due at start + k / rate, whatever happened before, so that it does not drift.
"""

from __future__ import annotations

import math
from collections import deque


class TicGrid:
    """The grid of due times. A late tic is run; grid points missed entirely are skipped."""

    def __init__(self, rate_hz: float, start_s: float) -> None:
        self._rate_hz = rate_hz
        self._start_s = start_s
        self.index = 0
        self.skipped = 0

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until the next tic, 0 if it is due."""
        return max(0.0, self._start_s + self.index / self._rate_hz - now_s)

    def advance(self, now_s: float) -> None:
        """Advance to the next tic, skipping every grid point that has been followed by another one already."""
        following = self.index + 1
        self.index = max(following, math.floor((now_s - self._start_s) * self._rate_hz))
        self.skipped += self.index - following


class FrameGrid:
    """Which tics show a frame, so that frames have their own rate, at most one per tic."""

    def __init__(self, frame_rate_hz: float, tic_rate_hz: float) -> None:
        self._frames_per_tic = frame_rate_hz / tic_rate_hz
        self._newest = -1

    def due(self, tic_index: int) -> bool:
        """Return whether this tic shows a frame; call it once per tic, in order."""
        frame = math.floor(tic_index * self._frames_per_tic + 1e-9)
        due, self._newest = frame > self._newest, frame
        return due


class RateMeter:
    """Events per second over the newest `size` events."""

    def __init__(self, size: int) -> None:
        self._times: deque[float] = deque(maxlen=size)

    def mark(self, now_s: float) -> None:
        self._times.append(now_s)

    def rate_hz(self) -> float:
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return 0.0
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])
