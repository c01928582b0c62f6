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
        """Carry out one action, which holds until the next one.

        Args:
            action: (len(choices),) int64, the index of each dimension's choice.

        Raises:
            ValueError: a choice does not exist.
        """
        ...

    def neutral(self) -> None:
        """Release all controls; the held action is remembered."""
        ...

    def resume(self) -> None:
        """Carry out the action again that was held before neutral()."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the actuator; optional."""
        ...

    def close(self) -> None:
        """Release all controls and the connection."""
        ...
