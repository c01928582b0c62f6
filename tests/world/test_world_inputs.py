from __future__ import annotations

import math

import pytest

from ami_world.inputs import Gait, HeldInputs, Movement, RefusedInput, movement

pytestmark = pytest.mark.filterwarnings("error")

GAIT = Gait(walk_speed=100.0, run_factor=2.0, turn_speed=120.0, look_deadzone=0.5)


def after(*messages: tuple[str, object]) -> HeldInputs:
    held = HeldInputs()
    for address, value in messages:
        held = held.receive(address, value)
    return held


def moved(*messages: tuple[str, object]) -> Movement:
    return movement(after(*messages), GAIT)


def test_without_messages_nothing_moves() -> None:
    assert movement(HeldInputs(), GAIT) == Movement()


def test_an_axis_is_held_for_ever() -> None:
    held = after(("/input/Vertical", 0.5))
    for _ in range(1000):
        held = held.after_tic()
    assert movement(held, GAIT).forward == 50.0


def test_plus_is_forward_and_right() -> None:
    move = moved(("/input/Vertical", 1.0), ("/input/Horizontal", 0.5), ("/input/LookHorizontal", 1.0))
    assert move == Movement(forward=100.0, right=50.0, turn_right=120.0)


@pytest.mark.parametrize("value", [0.5, -0.5, 0.1, 0.0])
def test_looks_within_the_deadzone_are_held_and_do_nothing(value: float) -> None:
    held = after(("/input/LookHorizontal", value))
    assert held.look_horizontal == value
    assert movement(held, GAIT).turn_right == 0.0


def test_looks_beyond_the_deadzone_turn_in_proportion() -> None:
    assert moved(("/input/LookHorizontal", -0.75)).turn_right == -90.0


@pytest.mark.parametrize(("value", "held"), [(7.0, 1.0), (-3, -1.0), (True, 1.0), (False, 0.0), (1, 1.0)])
def test_axes_take_any_number_and_are_clamped(value: object, held: float) -> None:
    assert after(("/input/Vertical", value)).vertical == held


@pytest.mark.parametrize("value", [1, 1.0, True, 0.7])
def test_buttons_are_pressed_by_ints_floats_and_bools(value: object) -> None:
    assert after(("/input/Run", value)).run


@pytest.mark.parametrize("value", [0, 0.0, False])
def test_buttons_are_released_by_ints_floats_and_bools(value: object) -> None:
    assert not after(("/input/Run", 1), ("/input/Run", value)).run


def test_run_multiplies_the_speed() -> None:
    assert moved(("/input/Run", 1), ("/input/Vertical", 1.0)).forward == 200.0


def test_move_and_look_buttons_act_like_full_axes() -> None:
    assert moved(("/input/MoveBackward", 1), ("/input/MoveLeft", 1)) == Movement(forward=-100.0, right=-100.0)
    assert moved(("/input/MoveForward", 1), ("/input/MoveRight", 1)) == Movement(forward=100.0, right=100.0)
    assert moved(("/input/LookLeft", 1)).turn_right == -120.0
    assert moved(("/input/LookRight", 1)).turn_right == 120.0


def test_an_axis_and_a_button_together_are_no_faster_than_one() -> None:
    assert moved(("/input/Vertical", 1.0), ("/input/MoveForward", 1)).forward == 100.0


def test_opposite_buttons_cancel_out() -> None:
    assert moved(("/input/LookLeft", 1), ("/input/LookRight", 1)).turn_right == 0.0


def test_a_held_jump_jumps_once() -> None:
    held = after(("/input/Jump", 1))
    assert movement(held, GAIT).jump
    held = held.after_tic().receive("/input/Jump", 1)
    assert held.jump
    assert not movement(held, GAIT).jump


def test_a_jump_released_before_the_tic_still_jumps() -> None:
    assert moved(("/input/Jump", 1), ("/input/Jump", 0)).jump


def test_a_second_press_jumps_again() -> None:
    held = after(("/input/Jump", 1)).after_tic().receive("/input/Jump", 0).receive("/input/Jump", 1)
    assert movement(held, GAIT).jump


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, b"1", [1.0]])
@pytest.mark.parametrize("address", ["/input/Vertical", "/input/Jump"])
def test_what_is_no_finite_number_is_refused(address: str, value: object) -> None:
    with pytest.raises(RefusedInput, match=address):
        HeldInputs().receive(address, value)


@pytest.mark.parametrize("address", ["/input/Fly", "/avatar/parameters/Blink", "/", "/input/vertical"])
def test_an_unknown_address_is_refused(address: str) -> None:
    with pytest.raises(RefusedInput, match="not an input address"):
        HeldInputs().receive(address, 1.0)
