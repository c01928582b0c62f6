"""An actuator without a world."""

from __future__ import annotations

from collections.abc import Sequence

from ami_shared.wire import Array


class NullActuator:
    """Takes actions and moves nothing."""

    def __init__(self, choices: Sequence[int] = (3, 3, 3, 2, 2)) -> None:
        self.choices = tuple(choices)

    def act(self, action: Array) -> None:
        """Ignore an action, (len(choices),) int64."""

    def neutral(self) -> None:
        """Do nothing: no control is held."""

    def resume(self) -> None:
        """Do nothing: no control was held."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
