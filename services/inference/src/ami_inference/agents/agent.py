"""What the interaction loop expects of an agent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ami_inference.sensors.sensor import Observation
from ami_shared.errors import ConfigurationError
from ami_shared.wire import Array


@dataclass(frozen=True)
class Decision:
    """An agent's response to one observation.

    Attributes:
        action: (number of action dimensions,) int64; not carried out at the end of an episode.
        record: name → array, what trainers get of this step; the same names, dtypes and shapes every time.
    """

    action: Array
    record: Mapping[str, Array]


class Agent(Protocol):
    """Turns observations into actions, with the newest parameters of its models."""

    def begin_segment(self) -> None:
        """Forget what connects the last step with the next: there was an interruption."""
        ...

    def step(self, observation: Observation) -> Decision:
        """Decide on one observation.

        Args:
            observation: its values are an image (3, H, W) uint8, or a vector (D,) float32.

        Returns:
            The action, (number of action dimensions,) int64, and the record.

        Raises:
            NotFiniteError: the observation is not finite.
            ConfigurationError: the models do not fit the observation.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what restore() needs to continue in the same way, as a tree of ami_shared.state."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier process; raise WireError if it does not fit."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return the agent's metrics for the learning record: means over the steps since the last call."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the agent; optional."""
        ...


@contextmanager
def explained(observation: Observation, fits: bool) -> Iterator[None]:
    """Turn torch's error for an observation that the models do not accept into one that a user can act on.

    Args:
        observation: the observation given to the models.
        fits: whether a similar one has been accepted before: then the models are not the cause.

    Raises:
        ConfigurationError: the models are for observations of another size or kind.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        if fits:
            raise
        seen, reason = observation.values, (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"models: they do not take observations {seen.dtype}{list(seen.shape)} ({reason:.120})"
        ) from error
