from __future__ import annotations


class ManualClock:
    """A clock that moves only when told to; sleeping moves it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now, self.slept = now, 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)

    def slept_s(self) -> float:
        return self.slept
