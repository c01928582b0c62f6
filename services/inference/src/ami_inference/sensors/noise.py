"""Random frames: for a first test of a whole system, without hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ami_inference.sensors.frames import checked_size
from ami_inference.sensors.sensor import Observation


class NoiseSensor:
    """Uniform random pixels, new at every step."""

    def __init__(self, height: int, width: int, seed: int = 0) -> None:
        self._shape = (3, *checked_size(height, width))
        self._random = np.random.default_rng(seed)

    def read(self) -> Observation:
        return Observation(self._random.integers(0, 256, self._shape, np.uint8))

    def state(self) -> Mapping[str, Any]:
        return {"random": self._random.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._random.bit_generator.state = state["random"]

    def statistics(self) -> Mapping[str, Any]:
        return {"sensor": "noise"}

    def close(self) -> None:
        """Do nothing: there is nothing to release."""
