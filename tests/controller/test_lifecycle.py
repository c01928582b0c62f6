from __future__ import annotations

from dataclasses import replace

import pytest

from ami_controller.lifecycle import Command, Lifecycle
from ami_controller.registry import Member
from ami_shared.gate import Desired


def member(name: str, state: str = "running", epoch: int = 0) -> Member:
    return Member(name, "body", "here", 1, "1", b"1", 0.0, state, epoch)


def begin(lifecycle: Lifecycle, kind: str, *members: str, now: float = 0.0, timeout_s: float = 5.0) -> Command:
    return lifecycle.command(kind, b"operator", 1, timeout_s, [member(name) for name in members], now)


def test_a_pause_waits_for_every_service() -> None:
    lifecycle = Lifecycle()
    command = begin(lifecycle, "pause", "a", "b")
    assert lifecycle.desired == Desired(paused=True, epoch=1)
    lifecycle.heard(member("a", "paused", 1), 0.25)
    assert lifecycle.take_finished(0.25) == []
    lifecycle.heard(member("b", "paused", 1), 0.5)
    assert lifecycle.take_finished(0.5) == [command]
    assert command.took_s == {"a": 0.25, "b": 0.5}
    assert command.waiting == set()
    assert lifecycle.take_finished(9.0) == []


@pytest.mark.parametrize(("state", "epoch"), [("running", 1), ("paused", 0), ("starting", 1), ("blind", 1)])
def test_a_pause_is_confirmed_by_nothing_else(state: str, epoch: int) -> None:
    lifecycle = Lifecycle()
    begin(lifecycle, "pause", "a")
    lifecycle.heard(member("a", state, epoch), 0.1)
    assert lifecycle.take_finished(0.1) == []


@pytest.mark.parametrize(
    ("state", "epoch", "confirms"),
    [("running", 2, True), ("blind", 2, True), ("running", 3, True), ("running", 1, False), ("paused", 2, False)],
)
def test_a_resume_is_confirmed_by_living_on_the_new_wish(state: str, epoch: int, confirms: bool) -> None:
    lifecycle = Lifecycle(paused=True, epoch=1)
    begin(lifecycle, "resume", "a")
    assert lifecycle.desired == Desired(paused=False, epoch=2)
    lifecycle.heard(member("a", state, epoch), 0.1)
    assert bool(lifecycle.take_finished(0.1)) is confirms


def test_repeating_a_command_that_holds_changes_no_epoch_and_is_confirmed_by_what_is() -> None:
    lifecycle = Lifecycle()
    begin(lifecycle, "pause", "a")
    lifecycle.heard(member("a", "paused", 1), 0.1)
    lifecycle.take_finished(0.1)
    again = begin(lifecycle, "pause", "a", now=1.0)
    assert lifecycle.desired == Desired(paused=True, epoch=1)
    lifecycle.heard(member("a", "paused", 1), 1.0)
    assert lifecycle.take_finished(1.0) == [again]


def test_a_pause_holds_until_resume() -> None:
    lifecycle = Lifecycle(paused=True, epoch=4)
    for kind in ("pause", "pause"):
        begin(lifecycle, kind)
        assert lifecycle.desired == Desired(paused=True, epoch=4)
    begin(lifecycle, "resume")
    assert lifecycle.desired == Desired(paused=False, epoch=5)


def test_a_command_runs_out_of_time_and_names_who_did_not_confirm() -> None:
    lifecycle = Lifecycle()
    command = begin(lifecycle, "pause", "a", "b", now=10.0, timeout_s=2.0)
    lifecycle.heard(member("a", "paused", 1), 10.5)
    assert lifecycle.take_finished(11.9) == []
    assert lifecycle.take_finished(12.0) == [command]
    assert command.waiting == {"b"}
    assert command.took_s == {"a": 0.5}


def test_a_command_can_be_given_up() -> None:
    lifecycle = Lifecycle()
    command = begin(lifecycle, "shutdown", "a", timeout_s=500.0)
    lifecycle.give_up(3.0)
    assert lifecycle.take_finished(3.0) == [command]
    assert command.waiting == {"a"}


def test_nobody_waits_for_a_member_that_is_gone() -> None:
    lifecycle = Lifecycle()
    command = begin(lifecycle, "pause", "a", "b")
    lifecycle.left("a", 0.1, orderly=False)
    lifecycle.heard(member("b", "paused", 1), 0.2)
    assert lifecycle.take_finished(0.2) == [command]
    assert (command.gone, list(command.took_s)) == (["a"], ["b"])


def test_a_shutdown_is_confirmed_by_leaving() -> None:
    lifecycle = Lifecycle()
    command = begin(lifecycle, "shutdown", "a", "b")
    assert lifecycle.desired == Desired(stopping=True, epoch=1)
    lifecycle.heard(member("a", "stopping", 1), 0.1)
    assert lifecycle.take_finished(0.1) == []
    lifecycle.left("a", 0.2, orderly=True)
    lifecycle.left("b", 0.3, orderly=False)
    assert lifecycle.take_finished(0.3) == [command]
    assert command.took_s == {"a": 0.2}
    assert command.gone == ["b"]


def test_an_orderly_leave_confirms_no_pause() -> None:
    lifecycle = Lifecycle()
    command = begin(lifecycle, "pause", "a")
    lifecycle.left("a", 0.1, orderly=True)
    assert (command.gone, command.took_s) == (["a"], {})


def test_a_shutdown_keeps_the_pause() -> None:
    lifecycle = Lifecycle(paused=True, epoch=1)
    begin(lifecycle, "shutdown")
    assert lifecycle.desired == Desired(paused=True, stopping=True, epoch=2)


def test_without_members_a_command_is_done_at_once() -> None:
    lifecycle = Lifecycle()
    command = begin(lifecycle, "pause")
    assert lifecycle.take_finished(0.0) == [command]


def test_commands_of_several_operators_are_all_answered() -> None:
    lifecycle = Lifecycle()
    first, second = begin(lifecycle, "pause", "a"), lifecycle.command("pause", b"other", 9, 5.0, [member("a")], 0.1)
    lifecycle.heard(member("a", "paused", 1), 0.5)
    assert lifecycle.take_finished(0.5) == [first, second]


def test_a_stranger_s_report_confirms_nothing() -> None:
    lifecycle = Lifecycle()
    begin(lifecycle, "pause", "a")
    lifecycle.heard(member("newcomer", "paused", 1), 0.1)
    lifecycle.left("newcomer", 0.1, orderly=False)
    assert lifecycle.take_finished(0.2) == []


def test_the_system_runs_when_everybody_expected_has_run_once() -> None:
    lifecycle, expected = Lifecycle(), ["a", "b"]
    assert lifecycle.system_state([member("a")], expected) == "starting"
    assert lifecycle.system_state([member("a"), member("b", "starting")], expected) == "starting"
    assert lifecycle.system_state([member("a", "blind"), member("b")], expected) == "running"
    assert lifecycle.system_state([member("a")], expected) == "running"


def test_the_system_is_paused_when_everybody_has_confirmed() -> None:
    lifecycle = Lifecycle(paused=True, epoch=3)
    assert lifecycle.system_state([member("a", "paused", 3), member("b", "running", 2)], []) == "pausing"
    assert lifecycle.system_state([member("a", "paused", 2)], []) == "pausing"
    assert lifecycle.system_state([member("a", "paused", 3)], []) == "paused"


def test_a_system_that_was_paused_when_it_ended_is_so_again_when_everybody_is_there() -> None:
    lifecycle = Lifecycle(paused=True, epoch=3)
    assert lifecycle.system_state([], ["a"]) == "pausing"
    assert lifecycle.system_state([member("a", "starting", 3)], ["a"]) == "pausing"
    assert lifecycle.system_state([member("a", "paused", 3)], ["a"]) == "paused"


def test_nobody_says_that_a_lost_body_is_paused_unless_it_was() -> None:
    """It acts on while it is cut off."""
    lifecycle = Lifecycle(paused=True, epoch=3)
    acting, paused = (replace(member("a", *told), lost=True) for told in (("running", 2), ("paused", 3)))
    trainer = replace(acting, role="trainer")
    states = [lifecycle.system_state([lost, member("b", "paused", 3)], ["b"]) for lost in (acting, paused, trainer)]
    assert states == ["pausing", "paused", "paused"]


def test_the_system_is_stopping_from_the_command_on() -> None:
    lifecycle = Lifecycle(paused=True)
    begin(lifecycle, "shutdown", "a")
    assert lifecycle.system_state([member("a")], ["a"]) == "stopping"
