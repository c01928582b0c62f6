"""No world at all."""

from __future__ import annotations

from collections.abc import Sequence

from ami_shared.wire import Array


class NullActuator:
    """Takes actions and moves nothing."""

    def __init__(self, choices: Sequence[int] = (3, 3, 3, 2, 2)) -> None:
        self.choices = tuple(choices)

    def act(self, action: Array) -> None:
        """Move nothing."""

    def neutral(self) -> None:
        """Nothing is held."""

    def resume(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        """Nothing to release."""
