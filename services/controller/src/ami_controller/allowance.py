"""How often somebody may do something: so much a second, and some more at once (a token bucket for each)."""

from __future__ import annotations

from collections.abc import Hashable

MOST_KNOWN = 4_096


class Allowance:
    """Counts for each of many; pure: the time is given."""

    def __init__(self, per_s: float, at_once: float) -> None:
        """Start with every holder's allowance full.

        Args:
            per_s: how often a second in the long run.
            at_once: how often after a rest.
        """
        self._per_s, self._at_once = per_s, at_once
        self._left: dict[Hashable, tuple[float, float]] = {}

    def take(self, who: Hashable, now: float) -> bool:
        """Return whether `who` may do it once more at a monotonic time; if so, it is counted."""
        left, since = self._left.get(who, (self._at_once, now))
        left = min(self._at_once, left + (now - since) * self._per_s)
        if len(self._left) >= MOST_KNOWN and who not in self._left:
            self._left.clear()
        self._left[who] = (left - 1.0 if left >= 1.0 else left, now)
        return left >= 1.0
