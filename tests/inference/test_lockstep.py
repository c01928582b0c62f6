"""Lockstep with the trainers' notices put into its hands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ami_inference import lockstep
from ami_inference.lockstep import Lockstep
from ami_shared.clock import Tick
from ami_shared.gate import Condition, Desired, Gate
from ami_shared.records import Record
from ami_shared.settled import Settled

PollFor = Callable[..., Any]
NOW = Tick(0.0, 0, False)


class Stream:
    """Writes down what is asked of the experience stream."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def put(self, record: Record) -> None:
        self.log.append(f"put {record.sequence}")

    def flush(self) -> None:
        self.log.append("flush")


@dataclass
class Held:
    """The replicas' versions."""

    versions: dict[str, int] = field(default_factory=dict)

    def newest_versions(self) -> dict[str, int]:
        return self.versions


class Waiting:
    """A body in lockstep, two steps a window and so first three records, and a thread that waits."""

    def __init__(self, *trainers: str) -> None:
        self.gate, self.stream, self.held = Gate(), Stream(), Held({"policy": 0, "encoder": 0})
        self.pace = Lockstep(2, trainers, "inc", self.gate, self.stream, self.held)
        self.ticks: list[Tick] = []
        self.thread: threading.Thread | None = None
        self._sequence = 0

    def live(self, records: int) -> None:
        for _ in range(records):
            self.pace.put(Record(0, self._sequence, 0.0, 0.0, {}, {"n": np.array(0)}))
            self._sequence += 1

    def settle(self, frontier: int, trainer: str = "ppo", incarnation: str = "inc", **versions: int) -> None:
        self.pace.heard(Settled(trainer, {incarnation: frontier}, versions))

    def begin_to_wait(self) -> None:
        self.thread = threading.Thread(target=lambda: self.ticks.append(self.pace.wait()), daemon=True)
        self.thread.start()

    def waits(self, seconds: float = 0.05) -> bool:
        assert self.thread is not None
        self.thread.join(seconds)
        return self.thread.is_alive()

    def returns(self) -> bool:
        return not self.waits(30.0) and self.ticks == [NOW]


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    made = Waiting("ppo")
    yield made
    made.gate.stop()
    if made.thread:
        made.thread.join(30.0)


def returns_at_once(pace: Lockstep) -> bool:
    ticks: list[Tick] = []
    waiting = threading.Thread(target=lambda: ticks.append(pace.wait()), daemon=True)
    with pytest.MonkeyPatch.context() as never_looking_up:
        never_looking_up.setattr(lockstep, "LOOK_S", 60.0)
        waiting.start()
        waiting.join(30.0)
    return ticks == [NOW] and pace.waited_s < 30.0


def test_within_a_window_nothing_waits(waiting: Waiting) -> None:
    waiting.live(2)
    assert returns_at_once(waiting.pace)
    waiting.live(2)
    assert returns_at_once(waiting.pace)
    assert waiting.stream.log == [f"put {n}" for n in range(4)]
    assert waiting.pace.interval_s == 0.0


def test_at_a_window_s_end_the_body_waits_for_the_trainer(waiting: Waiting) -> None:
    waiting.live(3)
    waiting.begin_to_wait()
    assert waiting.waits()
    waiting.settle(3)
    assert waiting.returns()
    assert waiting.pace.waited_s > 0


def test_before_the_first_record_the_body_waits_until_the_trainers_are_there(waiting: Waiting) -> None:
    waiting.begin_to_wait()
    assert waiting.waits()
    waiting.settle(0)
    assert waiting.returns()


def test_a_trainer_that_never_heard_of_the_body_is_through_with_nothing(waiting: Waiting) -> None:
    waiting.settle(7, incarnation="another")
    assert returns_at_once(waiting.pace)


def test_a_notice_that_was_there_before_is_enough(waiting: Waiting) -> None:
    waiting.live(3)
    waiting.settle(3)
    assert returns_at_once(waiting.pace)
    waiting.live(2)
    waiting.settle(9)
    assert returns_at_once(waiting.pace)


def test_older_frontiers_and_other_lives_do_not_count(waiting: Waiting) -> None:
    waiting.live(5)
    waiting.settle(3)
    waiting.begin_to_wait()
    waiting.settle(4)
    waiting.settle(5, incarnation="another")
    assert waiting.waits()
    waiting.settle(5)
    assert waiting.returns()


def test_all_trainers_are_waited_for_and_no_others() -> None:
    waiting = Waiting("ppo", "vae")
    waiting.live(3)
    waiting.begin_to_wait()
    waiting.settle(3, trainer="ppo")
    waiting.settle(3, trainer="somebody")
    assert waiting.waits()
    waiting.settle(3, trainer="vae")
    assert waiting.returns()


def test_without_trainers_nothing_waits() -> None:
    waiting = Waiting()
    waiting.live(3)
    assert returns_at_once(waiting.pace)


def test_the_parameters_of_the_notice_must_be_here_too(waiting: Waiting) -> None:
    waiting.live(3)
    waiting.begin_to_wait()
    waiting.settle(3, policy=2, decoder=9)
    assert waiting.waits()
    waiting.held.versions["policy"] = 2  # the body has no decoder
    assert waiting.returns()


def test_a_trainer_that_begins_anew_is_waited_for_again(waiting: Waiting) -> None:
    waiting.live(3)
    waiting.settle(3)
    waiting.settle(0)
    waiting.begin_to_wait()
    assert waiting.waits()
    waiting.settle(3)
    assert waiting.returns()


@pytest.mark.parametrize("wish", [Desired(paused=True, epoch=1), Desired(stopping=True)], ids=["pause", "stop"])
def test_a_pause_and_the_end_do_not_wait_for_trainers(
    waiting: Waiting, wish: Desired, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "LOOK_S", 60.0)
    waiting.live(3)
    waiting.begin_to_wait()
    assert waiting.waits()
    waiting.gate.wish(wish)
    assert waiting.returns(), "woken, rather than looking up now and then"


@pytest.mark.parametrize("wish", [Desired(paused=True, epoch=1), Desired(stopping=True)], ids=["pause", "stop"])
def test_a_wish_that_came_just_before_is_seen_as_well(waiting: Waiting, wish: Desired) -> None:
    waiting.live(3)
    waiting.gate.wish(wish)
    assert returns_at_once(waiting.pace)


def test_after_a_pause_the_body_goes_on_waiting(waiting: Waiting) -> None:
    waiting.live(3)
    waiting.gate.wish(Desired(paused=True, epoch=1))
    assert returns_at_once(waiting.pace)
    waiting.gate.confirm("paused", waiting.gate.desired)
    waiting.gate.wish(Desired(epoch=2))
    waiting.pace.restart()
    waiting.begin_to_wait()
    assert waiting.waits()
    waiting.settle(3)
    assert waiting.returns()


def test_a_resume_is_confirmed_without_waiting_for_trainers(waiting: Waiting, poll_for: PollFor) -> None:
    waiting.live(3)
    waiting.begin_to_wait()
    poll_for(lambda: waiting.gate.condition == Condition("running", 0))
    waiting.gate.wish(Desired(epoch=2))  # paused and resumed between two looks
    poll_for(lambda: waiting.gate.condition == Condition("running", 2))
    assert waiting.waits(), "no step is taken without the trainers"


def test_a_state_that_is_confirmed_already_is_not_changed_by_waiting(waiting: Waiting) -> None:
    waiting.gate.confirm("blind", waiting.gate.desired)
    waiting.begin_to_wait()
    assert waiting.waits()
    assert waiting.gate.condition == Condition("blind", 0)


def test_what_is_queued_is_sent_at_once_when_the_body_waits(waiting: Waiting) -> None:
    waiting.live(3)
    waiting.settle(3)
    waiting.pace.wait()
    assert waiting.stream.log == ["put 0", "put 1", "put 2", "flush"]


def test_whom_the_body_waits_for_is_said(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, poll_for: PollFor
) -> None:
    monkeypatch.setattr(lockstep, "SAY_AFTER_S", 0.02)
    caplog.set_level("INFO")
    waiting.begin_to_wait()
    poll_for(lambda: "waiting for ppo" in caplog.text)


def test_a_body_that_waits_is_not_stuck_and_says_how_long_it_waits(
    waiting: Waiting, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "LOOK_S", 0.02)
    before, begun = waiting.pace.moved_at, time.monotonic()
    waiting.begin_to_wait()
    poll_for(lambda: waiting.pace.moved_at > before)
    poll_for(lambda: waiting.pace.waited_s > 0.2)
    assert waiting.pace.waited_s <= time.monotonic() - begun
