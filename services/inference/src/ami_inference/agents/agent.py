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
    """What an agent made of one observation.

    Attributes:
        action: (number of action dimensions,) int64; not carried out at the end of an episode.
        record: the arrays that trainers get of this step; the same names, dtypes and shapes every time.
    """

    action: Array
    record: Mapping[str, Array]


class Agent(Protocol):
    """Turns observations into actions, with the newest parameters of its models."""

    def begin_segment(self) -> None:
        """Forget what tied the last step to the next: life was interrupted."""
        ...

    def step(self, observation: Observation) -> Decision:
        """Decide on one observation."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what restore() needs to go on in the same way, as ami_shared.state keeps it."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier life; raise WireError where it does not fit."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return what the learning record gets of the agent: means over the steps since the last call."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the agent; may be left out."""
        ...


@contextmanager
def explained(observation: Observation, fits: bool) -> Iterator[None]:
    """Turn what torch says of an observation that the models do not take into what a user can mend.

    Args:
        fits: whether one like it has been taken before: then the models are not the reason.

    Raises:
        ConfigurationError: the models are of another size, or for something else.
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
