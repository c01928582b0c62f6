"""Time: the clock as an interface, so that tests need not wait, and the absolute time grid of steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """What time it is, and how to wait."""

    def monotonic(self) -> float:
        """Seconds that never go back, from an arbitrary origin."""
        ...

    def time(self) -> float:
        """Seconds since the epoch."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait; zero or less returns at once."""
        ...

    def slept_s(self) -> float:
        """Seconds that the machine was suspended, while monotonic() stood still; 0.0 where that is unknown."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            time.sleep(seconds)

    def slept_s(self) -> float:
        boot = getattr(time, "CLOCK_BOOTTIME", None)  # Linux: it goes on while the machine is suspended
        return time.clock_gettime(boot) - time.clock_gettime(time.CLOCK_MONOTONIC) if boot is not None else 0.0


@dataclass(frozen=True)
class Tick:
    """One point of the grid at which a step was run.

    Attributes:
        lateness_s: how long after the first point not yet served the step began.
        skipped: points that passed without a step since the last tick.
        late: whether lateness_s exceeds the tolerance.
    """

    lateness_s: float
    skipped: int
    late: bool


class Grid:
    """Points in time at `origin + n * interval`. Late steps never move the grid and never pile up.

    An interval of 0 is a grid without waiting: every tick is due when it is asked for.
    """

    def __init__(self, interval_s: float, clock: Clock, tolerance: float = 0.1) -> None:
        """Begin a grid whose first point is now.

        Args:
            interval_s: seconds between two points.
            tolerance: share of the interval up to which a step counts as on time.
        """
        self.interval_s = interval_s
        self.at_cut = True
        self._clock = clock
        self._tolerance_s = tolerance * interval_s
        self.restart()

    def restart(self) -> None:
        """Begin a new grid whose first point is now."""
        self._origin = self._clock.monotonic()
        self._index = 0

    def wait(self) -> Tick:
        """Sleep until the next point is due, and return how late it is served."""
        if self.interval_s <= 0:
            return Tick(0.0, 0, False)
        due = self._origin + self._index * self.interval_s
        self._clock.sleep(due - self._clock.monotonic())
        lateness = max(0.0, self._clock.monotonic() - due)
        skipped = math.floor(lateness / self.interval_s)
        self._index += 1 + skipped
        return Tick(lateness, skipped, lateness > self._tolerance_s)


class Every:
    """Something that is due once per interval: `if every.due(now): …`."""

    def __init__(self, interval_s: float, first_after_s: float | None = None, now: float = 0.0) -> None:
        self._interval_s = interval_s
        self._next = now + (interval_s if first_after_s is None else first_after_s)

    def due(self, now: float) -> bool:
        """Return whether the interval has passed; if so, begin the next one."""
        if now < self._next:
            return False
        self._next = now + self._interval_s
        return True


class Rate:
    """Events per second over the last few seconds."""

    def __init__(self, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._samples: list[tuple[float, float]] = []

    def update(self, now: float, count: float) -> float:
        """Take the events counted so far, and return the rate over the window in 1/s."""
        self._samples.append((now, count))
        while len(self._samples) > 2 and now - self._samples[1][0] >= self._window_s:
            self._samples.pop(0)
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - begin) if end > begin else 0.0
