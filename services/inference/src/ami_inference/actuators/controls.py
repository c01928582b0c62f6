"""VRChat's input controls: five discrete choices to the values of five OSC addresses. No sockets here.

| dimension | choices                     | address               | values    |
| 0         | stop, forward, backward     | /input/Vertical       | 0, +v, −v |
| 1         | stop, right, left           | /input/Horizontal     | 0, +v, −v |
| 2         | stop, right, left           | /input/LookHorizontal | 0, +v, −v |
| 3         | release, press              | /input/Jump           | 0, 1      |
| 4         | release, press              | /input/Run            | 0, 1      |
"""

from __future__ import annotations

import math

from ami_shared.wire import Array

AXES = ("/input/Vertical", "/input/Horizontal", "/input/LookHorizontal")
BUTTONS = ("/input/Jump", "/input/Run")
CHOICES = (3, 3, 3, 2, 2)

Values = dict[str, float | int]

NEUTRAL: Values = {**dict.fromkeys(AXES, 0.0), **dict.fromkeys(BUTTONS, 0)}


def targets(action: Array, speeds: tuple[float, float, float]) -> Values:
    """Return address → value for an action.

    Args:
        action: (5,) int, the index of each dimension's choice.
        speeds: magnitudes of Vertical, Horizontal and LookHorizontal, each in (0, 1].

    Raises:
        ValueError: a choice does not exist.
    """
    chosen = [int(choice) for choice in action]
    if len(chosen) != len(CHOICES) or not all(0 <= c < n for c, n in zip(chosen, CHOICES, strict=True)):
        raise ValueError(f"action {chosen} is not a choice from each of {CHOICES}")
    values: Values = {
        address: (0.0, speed, -speed)[choice] for address, speed, choice in zip(AXES, speeds, chosen[:3], strict=True)
    }
    values |= dict(zip(BUTTONS, chosen[3:], strict=True))
    return values


class AxisLag:
    """First-order lag of the axes: y += (u − y)(1 − e^(−Δt/τ)). With τ = 0 there is no lag."""

    def __init__(self, time_constant_s: float) -> None:
        self._time_constant_s = time_constant_s
        self._values = dict.fromkeys(AXES, 0.0)

    def follow(self, wanted: Values, elapsed_s: float) -> Values:
        """Return the axes' values after approaching `wanted` for `elapsed_s` seconds; buttons are unchanged."""
        share = 1.0 if self._time_constant_s <= 0 else 1.0 - math.exp(-elapsed_s / self._time_constant_s)
        for address in AXES:
            self._values[address] += (wanted[address] - self._values[address]) * share
        return {**wanted, **self._values}

    def reset(self) -> None:
        """Return to rest."""
        self._values = dict.fromkeys(AXES, 0.0)
