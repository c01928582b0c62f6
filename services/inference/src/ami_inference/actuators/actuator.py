"""What the interaction loop expects of an actuator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ami_shared.wire import Array


class Actuator(Protocol):
    """Carries actions into the world."""

    @property
    def choices(self) -> tuple[int, ...]:
        """Number of choices of each action dimension, e.g. (3, 3, 3, 2, 2)."""
        ...

    def act(self, action: Array) -> None:
        """Carry out one action, (len(choices),) int64; it holds until the next one."""
        ...

    def neutral(self) -> None:
        """Let go of everything; the action held is remembered."""
        ...

    def resume(self) -> None:
        """Carry out again the action that was held before neutral()."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the actuator; may be left out."""
        ...

    def close(self) -> None:
        """Let go of everything and release the connection."""
        ...
