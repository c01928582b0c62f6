"""What the interaction loop expects of a sensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ami_shared.wire import Array


@dataclass(frozen=True)
class Observation:
    """What a sensor saw.

    Attributes:
        image: (3, H, W) uint8, RGB.
        age_s: time since it was captured.
        stretch: number of the unbroken stretch it belongs to; it grows when the source was lost and came back.
    """

    image: Array
    age_s: float = 0.0
    stretch: int = 0


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
