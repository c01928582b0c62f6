from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from ami_shared.errors import WireError
from ami_shared.gate import Condition, Desired, Gate


def test_a_fresh_gate_lets_pass_and_has_confirmed_nothing() -> None:
    gate = Gate()
    assert gate.desired == Desired(paused=False, stopping=False, epoch=0)
    assert gate.condition == Condition("starting", -1)
    assert not gate.stopping


def test_a_confirmation_carries_the_epoch_of_the_wish_that_was_acted_on() -> None:
    gate = Gate()
    gate.wish(Desired(paused=True, epoch=4))
    acted_on = gate.desired
    gate.wish(Desired(paused=False, epoch=5))  # arrives meanwhile
    gate.confirm("paused", acted_on)
    assert gate.condition == Condition("paused", 4)


def test_only_a_changed_condition_is_reported() -> None:
    reports: list[Condition] = []
    gate = Gate()
    gate.on_change = lambda: reports.append(gate.condition)
    for _ in range(3):
        gate.confirm("running", Desired())
    gate.confirm("running", Desired(epoch=1))
    gate.confirm("running", Desired(epoch=1))
    gate.confirm("blind", Desired(epoch=1))
    assert reports == [Condition("running", 0), Condition("running", 1), Condition("blind", 1)]


def test_a_loop_that_waits_for_something_else_is_told_of_every_wish() -> None:
    gate, told = Gate(), []
    gate.on_wish = lambda: told.append(gate.desired)
    gate.wish(Desired(paused=True, epoch=1))
    gate.stop()
    assert told == [Desired(paused=True, epoch=1), Desired(paused=True, stopping=True, epoch=1)]


def test_stopping_is_never_taken_back() -> None:
    gate = Gate()
    gate.stop()
    gate.wish(Desired(paused=True, epoch=3))
    assert gate.desired == Desired(paused=True, stopping=True, epoch=3)


def test_stopping_keeps_the_rest_of_the_wish() -> None:
    gate = Gate()
    gate.wish(Desired(paused=True, epoch=3))
    gate.stop()
    assert gate.desired == Desired(paused=True, stopping=True, epoch=3)


def test_a_wish_wakes_whoever_waits_for_a_change() -> None:
    gate, seen = Gate(), Desired()
    waiting = threading.Thread(target=gate.wait_for_change, args=(seen, 10.0))
    waiting.start()
    gate.wish(Desired())  # the same wish again changes nothing
    waiting.join(0.05)
    assert waiting.is_alive()
    gate.wish(Desired(paused=True, epoch=1))
    waiting.join(9.0)
    assert not waiting.is_alive()


def test_waiting_ends_with_its_timeout() -> None:
    begin = time.monotonic()
    Gate().wait_for_change(Desired(), timeout_s=0.02)
    assert 0.02 <= time.monotonic() - begin < 30.0


def test_a_wish_survives_the_way_there() -> None:
    wish = Desired(paused=True, stopping=False, epoch=9)
    assert Desired.from_fields(wish.to_fields()) == wish


@pytest.mark.parametrize(
    "fields",
    [{}, {"paused": 1, "stopping": False, "epoch": 1}, {"paused": True, "stopping": False, "epoch": True},
     {"paused": True, "stopping": None, "epoch": 1}, {"paused": True, "stopping": False, "epoch": "1"}],
    ids=str,
)  # fmt: skip
def test_a_malformed_wish_is_a_wire_error(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        Desired.from_fields(fields)


def test_who_waits_before_it_begins_confirms_a_pause_and_waits_no_longer_when_it_should_end() -> None:
    gate = Gate()
    assert gate.may_wait()
    assert gate.condition == Condition()
    gate.wish(Desired(paused=True, epoch=3))
    assert gate.may_wait()
    assert gate.condition == Condition("paused", 3)
    gate.wish(Desired(paused=True, stopping=True, epoch=4))
    assert not gate.may_wait()
    assert gate.condition == Condition("paused", 3), "what ends does not say that it pauses"
