"""What the interaction loop expects of an environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ami_inference.sensors.sensor import Observation
from ami_shared.wire import Array


class Environment(Protocol):
    """A world to act in.

    Optional attributes:
        waits: bool, whether the world stands still between two actions; then no stall ends a segment.
        max_silence_s: float, seconds without an action after which all controls have been released.
    """

    @property
    def choices(self) -> tuple[int, ...]:
        """Number of choices of each action dimension."""
        ...

    def observe(self) -> Observation:
        """Return the newest observation, or an episode's last.

        Raises:
            SensorLostError: there is none at present; the body tries again.
            NotFiniteError: it cannot be used. A world that waits must drop it, or it would return it forever.
        """
        ...

    def act(self, action: Array) -> None:
        """Carry out one action.

        Args:
            action: (len(choices),) int64, the index of each dimension's choice.
        """
        ...

    def rest(self) -> None:
        """Stand still until resume() or the next act()."""
        ...

    def resume(self) -> None:
        """Continue with the action held before rest()."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what restore() needs, as a tree of ami_shared.state; empty for a world that does not wait."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier process, before anything is observed."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return metrics for the learning record, e.g. of the episode that has just ended."""
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the environment."""
        ...

    def close(self) -> None:
        """Stand still for good and release everything."""
        ...
