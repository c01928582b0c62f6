from __future__ import annotations

import signal

import pytest

from ami_controller.cli.supervision import GOODBYE_S, HEALTHY_AFTER_S, LONGEST_DELAY_S, Supervision, Verdict
from ami_shared.errors import DisplacedError


@pytest.fixture
def supervision() -> Supervision:
    made = Supervision()
    for name in ("controller", "body"):
        made.started(name, 0.0)
    return made


def test_a_child_that_keeps_dying_is_started_less_and_less_often(supervision: Supervision) -> None:
    now, delays = 0.0, []
    for _ in range(7):
        verdict = supervision.ended("body", 1, now)
        assert verdict.exit_code is None
        assert verdict.delay_s is not None
        delays.append(verdict.delay_s)
        assert supervision.due(now + verdict.delay_s - 0.01) == []
        now += verdict.delay_s
        assert supervision.due(now) == ["body"]
        supervision.started("body", now)
        assert supervision.due(now + 99) == []
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_DELAY_S, LONGEST_DELAY_S]
    assert supervision.children["body"].restarts == 7


def test_a_child_that_lived_long_enough_begins_anew(supervision: Supervision) -> None:
    for now in (0.0, 1.0, 2.0):
        supervision.ended("body", -9, now)
        supervision.started("body", now)
    assert supervision.ended("body", -9, 2.0 + HEALTHY_AFTER_S + 0.1) == Verdict(delay_s=0.5)


def test_one_child_s_deaths_do_not_delay_another_s(supervision: Supervision) -> None:
    supervision.ended("body", 1, 0.0)
    supervision.started("body", 0.5)
    supervision.ended("body", 1, 0.6)
    assert supervision.ended("controller", 1, 0.7) == Verdict(delay_s=0.5)


def test_a_configuration_error_ends_everything(supervision: Supervision) -> None:
    assert supervision.ended("body", 2, 1.0) == Verdict(exit_code=2)


def test_the_controller_s_orderly_end_ends_everything(supervision: Supervision) -> None:
    assert supervision.ended("controller", 0, 1.0) == Verdict(exit_code=0)


def test_any_other_orderly_end_is_left_alone(supervision: Supervision) -> None:
    assert supervision.ended("body", 0, 1.0) == Verdict()
    assert supervision.due(99.0) == []


def test_while_everything_ends_nothing_is_started_again(supervision: Supervision) -> None:
    supervision.ended("body", 1, 1.0)
    supervision.ending = True
    assert supervision.ended("controller", 2, 1.0) == Verdict()
    assert supervision.due(99.0) == []


def test_one_whose_place_another_has_stays_down_and_the_rest_lives(supervision: Supervision) -> None:
    assert supervision.ended("body", DisplacedError.exit_code, 1.0) == Verdict(displaced=True)
    assert supervision.due(99.0) == []


def test_once_the_system_has_run_as_a_whole_one_that_cannot_run_any_more_does_not_end_it(
    supervision: Supervision,
) -> None:
    supervision.whole = True
    assert supervision.ended("body", 2, 1.0) == Verdict(delay_s=0.5)


def test_one_that_a_signal_ended_is_started_again(supervision: Supervision) -> None:
    assert supervision.ended("body", 128 + signal.SIGTERM, 1.0) == Verdict(delay_s=0.5)


def test_a_controller_that_dies_while_the_others_leave_is_not_started_again(supervision: Supervision) -> None:
    supervision.whole = True
    assert supervision.ended("body", 0, 1.0) == Verdict()
    assert supervision.ended("controller", -signal.SIGKILL, 2.0) == Verdict(exit_code=1)
    assert supervision.due(99.0) == []


@pytest.mark.parametrize("started_again", [False, True])
def test_a_controller_that_died_before_the_first_one_left_is_not_left_alone(
    supervision: Supervision, started_again: bool
) -> None:
    supervision.whole = True
    supervision.ended("controller", -signal.SIGKILL, 2.0)
    if started_again:
        supervision.started("controller", 2.5)
    assert supervision.ended("body", 0, 3.0) == Verdict(exit_code=1)


def test_a_controller_that_was_started_again_may_end_the_system_in_an_orderly_way(supervision: Supervision) -> None:
    supervision.whole = True
    supervision.ended("controller", -signal.SIGKILL, 2.0)
    supervision.started("controller", 2.5)
    assert supervision.ended("body", 0, 2.5 + GOODBYE_S) == Verdict()
    assert supervision.ended("controller", 0, 2.6 + GOODBYE_S) == Verdict(exit_code=0)
