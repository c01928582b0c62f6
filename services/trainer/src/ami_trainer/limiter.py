"""How much training the experience so far allows: updates per record, not per second."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ami_shared.config_checks import is_finite_number
from ami_shared.errors import ConfigurationError


class UpdateLimiter:
    """Grants `updates_per_record` gradient steps for each new record, and accumulates a bounded credit.

    A trainer that is slower than the stream forfeits what it cannot use, so that it does not fall ever further behind.
    Safe between the feeder and the training thread.
    """

    def __init__(self, updates_per_record: float, most_saved: float = 1_000.0) -> None:
        """Start without credit.

        Args:
            updates_per_record: gradient steps for each new record.
            most_saved: largest credit, in gradient steps, 1 or more; what exceeds it is forfeited.

        Raises:
            ConfigurationError: updates_per_record is out of range.
        """
        if not is_finite_number(updates_per_record) or not updates_per_record > 0:
            raise ConfigurationError(
                f"trainers.NAME.updates_per_record={updates_per_record!r} must be a number above 0"
            )
        self._per_record, self._most_saved = updates_per_record, most_saved
        self._lock = threading.Lock()
        self.credit = 0.0
        self.forfeited = 0.0

    def save_all(self) -> None:
        """Forfeit nothing: the bodies wait."""
        self._most_saved = float("inf")

    def record(self, count: int) -> None:
        """Add the credit for `count` new records."""
        with self._lock:
            wanted = self.credit + count * self._per_record
            self.credit = min(wanted, self._most_saved)
            self.forfeited += wanted - self.credit

    def available(self) -> int:
        """Return the number of gradient steps that may be taken now."""
        return int(self.credit)

    def statistics(self) -> Mapping[str, float]:
        """Return counters for the status."""
        return {"credit": self.credit, "forfeited": self.forfeited}

    def state(self) -> Mapping[str, float]:
        """Return what restore() needs to continue."""
        return self.statistics()

    def restore(self, state: Mapping[str, float]) -> None:
        """Take over the credit of an earlier process."""
        self.credit, self.forfeited = min(float(state["credit"]), self._most_saved), float(state["forfeited"])

    def spend(self) -> None:
        """Deduct one gradient step from the credit."""
        with self._lock:
            self.credit -= 1.0
