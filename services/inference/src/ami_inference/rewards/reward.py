"""What the agent expects of a reward: a rating of one transition, and a state that a checkpoint can keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ami_shared.config_checks import is_finite_number
from ami_shared.errors import ConfigurationError


@dataclass(frozen=True)
class Transition:
    """What is known about a step's outcome when the next observation is available.

    Attributes:
        surprise: mean over the embedding of −log p(z | what the agent predicted); None without forward dynamics.
        extrinsic: the environment's reward; None if it gives none.
    """

    surprise: float | None = None
    extrinsic: float | None = None


def check_finite(**values: object) -> None:
    """Raise ConfigurationError if a value is not a finite number."""
    for name, value in values.items():
        if not is_finite_number(value):
            raise ConfigurationError(f"inference.agent.reward: {name}={value!r} must be a finite number")


class RewardModule(Protocol):
    """Turns a sequence of transitions into rewards."""

    def begin_segment(self) -> None:
        """Note an interruption: the next transition does not follow directly on the last."""
        ...

    def reward(self, transition: Transition) -> float:
        """Return the reward of one transition.

        Raises:
            ConfigurationError: the transition lacks what this reward is computed from.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what restore() needs to continue in the same way; plain numbers and maps only."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier process."""
        ...


class Stateless:
    """Base class of rewards without state."""

    def begin_segment(self) -> None:
        """Do nothing: transitions are rated independently."""

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing: there is no state."""
