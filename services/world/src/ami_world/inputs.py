"""The meaning of VRChat's OSC input: messages to held inputs, held inputs to movement.

Pure: no sockets, no clock, no game. As in VRChat, an axis or a button keeps its last value indefinitely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

AXES = {
    "/input/Vertical": "vertical",
    "/input/Horizontal": "horizontal",
    "/input/LookHorizontal": "look_horizontal",
}
BUTTONS = {
    "/input/Jump": "jump",
    "/input/Run": "run",
    "/input/MoveForward": "move_forward",
    "/input/MoveBackward": "move_backward",
    "/input/MoveLeft": "move_left",
    "/input/MoveRight": "move_right",
    "/input/LookLeft": "look_left",
    "/input/LookRight": "look_right",
}
PRESSED_FROM = 0.5


class RefusedInput(ValueError):
    """A message that VRChat would ignore; it is counted and has no effect."""


@dataclass(frozen=True)
class HeldInputs:
    """All inputs as last set: axes in [-1, 1], positive forward and right; buttons pressed or not."""

    vertical: float = 0.0
    horizontal: float = 0.0
    look_horizontal: float = 0.0
    jump: bool = False
    run: bool = False
    move_forward: bool = False
    move_backward: bool = False
    move_left: bool = False
    move_right: bool = False
    look_left: bool = False
    look_right: bool = False
    jump_wanted: bool = False  # pressed since the last tic, even if released again

    def receive(self, address: str, value: object) -> HeldInputs:
        """Return the inputs after one message.

        Raises:
            RefusedInput: the address is unknown, or the value is not a finite number.
        """
        changed: dict[str, Any] = {}
        if address in AXES:
            changed[AXES[address]] = _clamp(_number(address, value))
        elif address in BUTTONS:
            changed[BUTTONS[address]] = _number(address, value) >= PRESSED_FROM
        else:
            raise RefusedInput(f"{address[:80]!r} is not an input address")
        held = replace(self, **changed)
        return replace(held, jump_wanted=True) if held.jump and not self.jump else held

    def after_tic(self) -> HeldInputs:
        """Return what is still held after a tic has used the inputs: all except the jump."""
        return replace(self, jump_wanted=False) if self.jump_wanted else self


@dataclass(frozen=True)
class Gait:
    """How fast an axis at its maximum moves the avatar."""

    walk_speed: float  # map units a second
    run_factor: float
    turn_speed: float  # degrees a second
    look_deadzone: float  # look magnitudes up to this do nothing


@dataclass(frozen=True)
class Movement:
    """What the avatar does during one tic, in map units and degrees a second."""

    forward: float = 0.0
    right: float = 0.0
    turn_right: float = 0.0
    jump: bool = False


def movement(held: HeldInputs, gait: Gait) -> Movement:
    """Return what the held inputs make the avatar do."""
    speed = gait.walk_speed * (gait.run_factor if held.run else 1.0)
    look = held.look_horizontal if abs(held.look_horizontal) > gait.look_deadzone else 0.0
    return Movement(
        forward=speed * _clamp(held.vertical + held.move_forward - held.move_backward),
        right=speed * _clamp(held.horizontal + held.move_right - held.move_left),
        turn_right=gait.turn_speed * _clamp(look + held.look_right - held.look_left),
        jump=held.jump_wanted,
    )


def _number(address: str, value: object) -> float:
    if not isinstance(value, int | float):
        raise RefusedInput(f"{address} got a {type(value).__name__}, but takes a number or a bool")
    if not math.isfinite(value):
        raise RefusedInput(f"{address} got {value}, but takes a finite number")
    return float(value)


def _clamp(value: float) -> float:
    return max(-1.0, min(1.0, value))
