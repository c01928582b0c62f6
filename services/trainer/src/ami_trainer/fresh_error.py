"""The error on records not yet trained on: what it was at first, and what it is now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FIRST = 5  # measurements that make the first error
KEPT = 0.9  # weight of all earlier measurements against the newest: a memory of about ten


class FreshError:
    """Means over the first measurements and over the newest ones.

    An error may be relative to a yardstick: then sums are divided, for the quotients of single measurements have no
    useful mean, e.g. where almost nothing moved.
    """

    def __init__(self) -> None:
        self._measured = 0
        self._error = self._yardstick = 0.0
        self._first: float | None = None

    def note(self, error: float, yardstick: float = 1.0) -> None:
        """Take in one measurement. What is not finite, as of a model that is about to be restored, does not count."""
        if not (math.isfinite(error) and math.isfinite(yardstick)):
            return
        kept = 1.0 if self._measured < FIRST else KEPT
        self._error, self._yardstick = kept * self._error + error, kept * self._yardstick + yardstick
        self._measured += 1
        if self._measured <= FIRST:
            self._first = self._error / self._yardstick

    def statistics(self) -> dict[str, float | None]:
        """Return the error at `first` and `now`; None before anything was measured."""
        return {"first": self._first, "now": self._error / self._yardstick if self._measured else None}

    def state(self) -> dict[str, Any]:
        """Return what restore() needs."""
        return {
            "first": self._first,
            "measured": self._measured,
            "error": self._error,
            "yardstick": self._yardstick,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier process; older checkpoints only have the error at `first` and `now`."""
        self._first = state["first"]
        known = state["first"] is not None
        self._measured = int(state.get("measured", FIRST if known else 0))
        self._error = float(state.get("error", state.get("now") or 0.0))
        self._yardstick = float(state.get("yardstick", 1.0 if known else 0.0))
