"""The hub's time on every machine: services date what they send by the hub's clock, so that ages are comparable.

Each heartbeat asks for it. The answer's time lies between asking and hearing: the middle is off by half the round trip
at most (Cristian 1989). The quickest of the last answers counts, and the clock is set only if it is certainly wrong.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ami_shared.clock import SystemClock

ANSWERS = 16
LEAST_DOUBT_S = 0.005


class HubClock(SystemClock):
    """The machine's clock, corrected by the hub's answers."""

    def __init__(self, own: Callable[[], float] = time.time) -> None:
        """Start with this machine's own time.

        Args:
            own: returns this machine's time, seconds since the epoch.
        """
        self._own = own
        self._asked: deque[float] = deque(maxlen=ANSWERS)
        self._answers: deque[tuple[float, float]] = deque(maxlen=ANSWERS)
        self.offset_s = 0.0
        self.doubt_s: float | None = None

    def time(self) -> float:
        """Seconds since the epoch, by the hub's clock once it is known."""
        return self._own() + self.offset_s

    def ask(self) -> float:
        """Return the value to send with a question; heard() needs it back."""
        asked = self._own()
        self._asked.append(asked)
        return asked

    def heard(self, asked: Any, told: Any) -> None:
        """Take in the hub's time from an answer to one of the last questions; anything else is ignored.

        On a slow line the next question is asked before the answer to this one arrives.
        """
        now = self._own()
        if asked not in self._asked or not isinstance(told, float) or not math.isfinite(told):
            return
        while self._asked.popleft() != asked:
            pass  # older ones: answers come in order
        doubt_s, offset_s = (now - asked) / 2, told - (now + asked) / 2
        if doubt_s < 0:  # this machine's clock was set back meanwhile
            return
        if self._answers and abs(offset_s - self.offset_s) > doubt_s + (self.doubt_s or 0.0) + LEAST_DOUBT_S:
            self._answers.clear()  # one of the two clocks was set, or has drifted away
        self._answers.append((doubt_s, offset_s))
        best_doubt_s, best_s = min(self._answers)
        if self.doubt_s is None or abs(best_s - self.offset_s) > best_doubt_s + LEAST_DOUBT_S:
            self.offset_s = best_s
        self.doubt_s = best_doubt_s

    def statistics(self) -> dict[str, Any]:
        """Return how far the hub's clock is ahead of this machine's, and the uncertainty of that; both in seconds."""
        return {"offset_s": self.offset_s, "doubt_s": self.doubt_s}
