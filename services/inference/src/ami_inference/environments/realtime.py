"""A world that does not wait: a sensor that sees it, and an actuator that moves in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ami_inference.actuators.actuator import Actuator
from ami_inference.sensors.sensor import Observation, Sensor
from ami_shared.state import Restorable, restore_each, state_of
from ami_shared.wire import Array


class RealTimeEnvironment:
    """One sensor and one actuator.

    Attributes:
        max_silence_s: seconds without an action after which the actuator has released all controls.
    """

    def __init__(self, sensor: Sensor, actuator: Actuator) -> None:
        self._sensor = sensor
        self._actuator = actuator
        self.choices = actuator.choices
        self.max_silence_s = float(getattr(actuator, "max_silence_s", math.inf))

    def observe(self) -> Observation:
        """Return the sensor's newest observation; raise SensorLostError if there is none at present."""
        return self._sensor.read()

    def act(self, action: Array) -> None:
        """Let the actuator carry out one action, (len(choices),) int64; raise ValueError if a choice does not exist."""
        self._actuator.act(action)

    def rest(self) -> None:
        self._actuator.neutral()

    def resume(self) -> None:
        self._actuator.resume()

    def state(self) -> Mapping[str, Any]:
        return {"sensor": dict(state_of(self._sensor)), "actuator": dict(state_of(self._actuator))}

    def restore(self, state: Mapping[str, Any]) -> None:
        restore_each({"sensor": Restorable(self._sensor), "actuator": Restorable(self._actuator)}, state)

    def metrics(self) -> Mapping[str, float]:
        return {}

    def statistics(self) -> Mapping[str, Any]:
        told = self._actuator.statistics() if hasattr(self._actuator, "statistics") else {}
        return {**told, **self._sensor.statistics()}

    def close(self) -> None:
        try:
            self._actuator.close()
        finally:
            self._sensor.close()
