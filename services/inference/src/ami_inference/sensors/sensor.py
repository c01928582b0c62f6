"""What the interaction loop expects of a sensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ami_shared.records import Ending
from ami_shared.wire import Array


@dataclass(frozen=True)
class Observation:
    """What a sensor saw.

    Attributes:
        values: (3, H, W) uint8, RGB; or a vector (D,) float32.
        age_s: time since it was captured.
        stretch: number of the unbroken stretch it belongs to; it grows when the source was lost and came back,
            and with every episode.
        reward: what the world gave for the action before; None where the world gives none.
        ending: whether this is an episode's last observation: nothing follows upon it.
        beginning: whether this is an episode's first: nothing before it led here, whatever happened meanwhile.
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
            SensorLostError: there is none at present; the sensor goes on trying by itself.
        """
        ...

    def statistics(self) -> Mapping[str, Any]:
        """Return what `ami status` shows of the sensor."""
        ...

    def close(self) -> None:
        """Release the source."""
        ...
