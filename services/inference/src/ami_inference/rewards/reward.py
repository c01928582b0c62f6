"""What the agent expects of a reward: a judgement of one transition, and a state that a checkpoint can keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ami_shared.config import is_finite_number
from ami_shared.errors import ConfigurationError


@dataclass(frozen=True)
class Transition:
    """What is known of one step's outcome when the next observation is there.

    Attributes:
        surprise: mean over the embedding of −log p(z | what the agent predicted); None without forward dynamics.
        extrinsic: what the world gave; None where it gives none.
    """

    surprise: float | None = None
    extrinsic: float | None = None


def check_finite(**values: object) -> None:
    """Raise ConfigurationError where a value is not a finite number."""
    for name, value in values.items():
        if not is_finite_number(value):
            raise ConfigurationError(f"inference.agent.reward: {name}={value!r} must be a finite number")


class RewardModule(Protocol):
    """Turns transitions into rewards, one after the other."""

    def begin_segment(self) -> None:
        """Life was interrupted: the next transition does not follow upon the last."""
        ...

    def reward(self, transition: Transition) -> float:
        """Return the reward of one transition.

        Raises:
            ConfigurationError: the transition does not have what this reward is made of.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what restore() needs to go on in the same way; plain numbers and maps only."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier life."""
        ...


class Stateless:
    """The part of a reward that remembers nothing."""

    def begin_segment(self) -> None:
        """Nothing ties one transition to the next."""

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take over."""
