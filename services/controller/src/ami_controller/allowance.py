"""Rate limits: a number of actions per second, plus a burst, for each of many holders (token buckets)."""

from __future__ import annotations

from collections.abc import Hashable

MOST_KNOWN = 4_096


class Allowance:
    """One token bucket per holder. Pure: the time is an argument."""

    def __init__(self, per_s: float, at_once: float) -> None:
        """Start with every holder's allowance full.

        Args:
            per_s: actions per second in the long run.
            at_once: actions at once after a rest.
        """
        self._per_s, self._at_once = per_s, at_once
        self._left: dict[Hashable, tuple[float, float]] = {}

    def take(self, who: Hashable, now: float) -> bool:
        """Return whether `who` may act at a monotonic time; if so, the action is counted."""
        left, since = self._left.get(who, (self._at_once, now))
        left = min(self._at_once, left + (now - since) * self._per_s)
        if len(self._left) >= MOST_KNOWN and who not in self._left:
            self._left.clear()
        self._left[who] = (left - 1.0 if left >= 1.0 else left, now)
        return left >= 1.0
