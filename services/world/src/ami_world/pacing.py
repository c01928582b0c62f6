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


class HangWatch:
    """Whether the tics have stopped for too long; not while this process itself, or the whole machine, was stopped."""

    def __init__(self, hang_s: float, look_s: float) -> None:
        """Start with the first look.

        Args:
            hang_s: seconds without a tic that are too long.
            look_s: intended seconds between two looks.
        """
        self._hang_s, self._look_s = hang_s, look_s
        self._tics = -1
        self._looked_s = self._moved_s = -math.inf

    def has_hung(self, tics: int, now_s: float) -> bool:
        """Look at the number of tics so far."""
        stopped = now_s - self._looked_s > 5 * self._look_s
        if tics != self._tics or stopped:
            self._tics, self._moved_s = tics, now_s
        self._looked_s = now_s
        return now_s - self._moved_s > self._hang_s


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
