"""What the interaction loop expects of a sensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ami_shared.records import Ending
from ami_shared.wire import Array


@dataclass(frozen=True)
class Observation:
    """One observation of a sensor.

    Attributes:
        values: (3, H, W) uint8, RGB; or a vector (D,) float32.
        age_s: seconds since it was captured.
        stretch: number of the uninterrupted stretch that it belongs to; it grows when the source was lost and returned,
            and with every episode.
        reward: the environment's reward for the previous action; None if it gives none.
        ending: whether and how this observation ends an episode.
        beginning: whether this is an episode's first observation, to which no earlier action has led.
    """

    values: Array
    age_s: float = 0.0
    stretch: int = 0
    reward: float | None = None
    ending: Ending = Ending.NONE
    beginning: bool = False


class Sensor(Protocol):
    """Delivers the newest observation without ever waiting for the source."""

    def read(self) -> Observation:
        """Return the newest observation.

        Raises:
            SensorLostError: there is none at present; the sensor keeps trying by itself.
        """
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the sensor."""
        ...

    def close(self) -> None:
        """Release the source."""
        ...
