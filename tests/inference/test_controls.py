from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ami_inference.actuators import NullActuator
from ami_inference.actuators.controls import AXES, CHOICES, NEUTRAL, AxisLag, Values, targets

SPEEDS = (0.9, 0.8, 0.7)
VERTICAL, HORIZONTAL, LOOK = AXES


@pytest.mark.parametrize(
    ("dimension", "choice", "address", "value"),
    [
        (0, 1, "/input/Vertical", 0.9),
        (0, 2, "/input/Vertical", -0.9),
        (1, 1, "/input/Horizontal", 0.8),
        (1, 2, "/input/Horizontal", -0.8),
        (2, 1, "/input/LookHorizontal", 0.7),
        (2, 2, "/input/LookHorizontal", -0.7),
        (3, 1, "/input/Jump", 1),
        (4, 1, "/input/Run", 1),
    ],
)
def test_every_choice_moves_its_own_address_and_nothing_else(
    dimension: int, choice: int, address: str, value: float
) -> None:
    action = np.zeros(5, np.int64)
    action[dimension] = choice
    assert targets(action, SPEEDS) == {**NEUTRAL, address: value}


def test_no_choice_is_neutral() -> None:
    assert targets(np.zeros(5, np.int64), SPEEDS) == NEUTRAL
    assert dict.fromkeys((*AXES, "/input/Jump", "/input/Run"), 0) == NEUTRAL


def test_axes_are_floats_and_buttons_are_ints() -> None:
    for values in (NEUTRAL, targets(np.array([1, 2, 0, 1, 0]), SPEEDS)):
        assert [type(value) for value in values.values()] == [float, float, float, int, int]


@pytest.mark.parametrize("action", [[3, 0, 0, 0, 0], [0, 0, 0, 2, 0], [0, 0, 0, 0, -1], [0] * 4, [0] * 6, []], ids=str)
def test_a_choice_that_does_not_exist_is_refused(action: list[int]) -> None:
    with pytest.raises(ValueError, match="a choice from each"):
        targets(np.array(action, np.int64), SPEEDS)


def wanted(**axes: float) -> Values:
    return {**NEUTRAL, **{f"/input/{name}": value for name, value in axes.items()}}


def test_axes_follow_with_the_time_constant() -> None:
    lag = AxisLag(0.2)
    first = lag.follow(wanted(Vertical=1.0), 0.1)
    assert first[VERTICAL] == pytest.approx(1 - math.exp(-0.5))
    second = lag.follow(wanted(Vertical=1.0), 0.1)
    assert second[VERTICAL] == pytest.approx(1 - math.exp(-1.0))
    assert second[HORIZONTAL] == 0.0
    back = lag.follow(wanted(), 0.2)
    assert back[VERTICAL] == pytest.approx((1 - math.exp(-1.0)) * math.exp(-1.0))


def test_two_half_steps_are_one_whole_step() -> None:
    halves, whole = AxisLag(0.2), AxisLag(0.2)
    halves.follow(wanted(LookHorizontal=-0.7), 0.05)
    assert halves.follow(wanted(LookHorizontal=-0.7), 0.05)[LOOK] == pytest.approx(
        whole.follow(wanted(LookHorizontal=-0.7), 0.1)[LOOK]
    )


def test_without_a_time_constant_axes_follow_at_once() -> None:
    assert AxisLag(0.0).follow(wanted(Vertical=-1.0), 0.0)[VERTICAL] == -1.0


def test_buttons_are_never_lagged() -> None:
    pressed: Values = {**NEUTRAL, "/input/Jump": 1}
    assert AxisLag(5.0).follow(pressed, 0.001)["/input/Jump"] == 1


def test_at_rest_nothing_is_left_of_the_past() -> None:
    lag = AxisLag(0.2)
    lag.follow(wanted(Vertical=1.0), 10.0)
    lag.reset()
    assert lag.follow(wanted(), 0.0)[VERTICAL] == 0.0


def test_the_null_actuator_has_choices_and_moves_nothing() -> None:
    actuator: Any = NullActuator([2, 4])
    assert actuator.choices == (2, 4)
    assert NullActuator().choices == CHOICES
    actuator.act(np.zeros(2, np.int64))
    actuator.neutral()
    actuator.resume()
    actuator.close()
