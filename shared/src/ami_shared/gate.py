"""The service's side of the lifecycle: what the controller wants of it, and what it has confirmed.

The controller's wish is a level, not an event: every answer to a heartbeat contains it, so that the next one makes up
for a lost message. `epoch` grows with every pause and resume; a service confirms by reporting the epoch it acts on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ami_shared.wire import typed


@dataclass(frozen=True)
class Desired:
    """What the controller wants every service to do."""

    paused: bool = False
    stopping: bool = False
    epoch: int = 0

    def to_fields(self) -> dict[str, Any]:
        return {"paused": self.paused, "stopping": self.stopping, "epoch": self.epoch}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Desired:
        """Parse the wish; raise WireError if a field is missing or of the wrong type."""
        paused, stopping = (
            typed(fields, "paused", bool, "desired"),
            typed(fields, "stopping", bool, "desired"),
        )
        return cls(paused, stopping, typed(fields, "epoch", int, "desired"))


@dataclass(frozen=True)
class Condition:
    """What a service reports of itself: its state, and the epoch of the wish that it acts on."""

    state: str = "starting"
    epoch: int = -1


class Gate:
    """Stands between the control link, which brings wishes, and a loop, which passes the gate at every step."""

    def __init__(self) -> None:
        """Start without a wish from the controller.

        Who reports the condition sets `on_change`, to do so at once. A loop that waits for something other than the
        gate sets `on_wish`, to be woken by a new wish.
        """
        self._wake = threading.Condition()
        self._desired = Desired()
        self._condition = Condition()
        self.on_change: Callable[[], None] = lambda: None
        self.on_wish: Callable[[], None] = lambda: None

    @property
    def desired(self) -> Desired:
        """The controller's newest wish."""
        return self._desired

    @property
    def condition(self) -> Condition:
        """What this service reports of itself."""
        return self._condition

    @property
    def stopping(self) -> bool:
        """Whether the loop should end."""
        return self._desired.stopping

    def wish(self, desired: Desired) -> None:
        """Take over the controller's wish. Stopping is never revoked."""
        with self._wake:
            self._desired = replace(desired, stopping=desired.stopping or self._desired.stopping)
            self._wake.notify_all()
        self.on_wish()

    def stop(self) -> None:
        """Make the loop end, independently of the controller."""
        self.wish(replace(self._desired, stopping=True))

    def confirm(self, state: str, desired: Desired) -> None:
        """Report that the loop now acts on this wish, in this state."""
        confirmed = Condition(state, desired.epoch)
        if confirmed != self._condition:
            self._condition = confirmed
            self.on_change()

    def may_wait(self) -> bool:
        """Return whether a loop that has not begun may wait for something else: not if it should end.

        A pause needs no more than that it waits, and is confirmed.
        """
        desired = self._desired
        if desired.paused and not desired.stopping:
            self.confirm("paused", desired)
        return not desired.stopping

    def wait_for_change(self, seen: Desired, timeout_s: float | None = None) -> None:
        """Return when the wish differs from `seen`, or after the timeout."""
        with self._wake:
            self._wake.wait_for(lambda: self._desired != seen, timeout_s)
