from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ami_shared import limits
from ami_shared.errors import DisplacedError, JoinRefusedError, TakenBackError, WireError
from ami_shared.gate import Condition, Desired
from ami_shared.hub_clock import HubClock
from ami_shared.membership import Identity, Membership
from ami_shared.wire import Message


class Life:
    """A membership, the wishes it heard, and short words for what the controller says."""

    def __init__(self) -> None:
        self.wishes: list[Desired] = []
        self.identity = Identity("body", "body", {"seed": 3}, "inc", "host", 17)
        self.membership = Membership(self.identity, self.wishes.append)
        self.now = 100.0

    def poll(self, after_s: float = 0.0, state: str = "running") -> Message | None:
        self.now += after_s
        return self.membership.poll(self.now, Condition(state, 2), lambda: {"steps": 5})

    def hears(self, kind: str, **fields: Any) -> bool:
        return self.membership.handle(Message(kind, "controller", "c", fields), self.now)

    def hears_wish(self, kind: str = "wish", **changed: Any) -> bool:
        wish: dict[str, Any] = {
            "desired": {"paused": False, "stopping": False, "epoch": 2},
            "versions": {"image_encoder": 4},
            "version_floors": {"image_encoder": 6},
        }
        return self.hears(kind, **wish | changed)


@pytest.fixture
def life() -> Life:
    return Life()


def test_a_service_first_asks_to_join(life: Life) -> None:
    message = life.poll()
    assert message is not None
    assert (message.kind, message.sender, message.incarnation) == ("join", "body", "inc")
    told: Mapping[str, Any] = message.fields
    assert {key: told[key] for key in ("role", "host", "pid", "agreement", "state", "epoch")} == {
        "role": "body", "host": "host", "pid": 17, "agreement": {"seed": 3}, "state": "running", "epoch": 2,
    }  # fmt: skip


def test_the_clock_is_set_by_what_the_controller_tells() -> None:
    life, clock = Life(), HubClock(lambda: 100.0)
    life.membership = Membership(life.identity, life.wishes.append, clock)
    for kind in ("joined", "wish"):
        message = life.poll(1.0)
        assert message is not None
        assert message.fields["asked"] == 100.0
        life.hears_wish(kind, asked=message.fields["asked"], clock=400.0)
    assert clock.offset_s == 300.0


def test_the_join_is_repeated_at_every_heartbeat_until_it_is_answered(life: Life) -> None:
    assert [m.kind if (m := life.poll(step)) else None for step in (0, 0.25, 0.25, 0.4, 0.1)] == [
        "join", None, "join", None, "join",
    ]  # fmt: skip


def test_a_member_sends_heartbeats_with_its_statistics(life: Life) -> None:
    life.poll()
    assert life.hears_wish("joined")
    message = life.poll(limits.SERVICE_HEARTBEAT)
    assert message is not None
    assert message.kind == "heartbeat"
    assert message.fields["statistics"] == {"steps": 5}
    assert (message.fields["state"], message.fields["epoch"]) == ("running", 2)
    assert life.poll(limits.SERVICE_HEARTBEAT / 2) is None
    assert life.membership.next_send() == pytest.approx(life.now + limits.SERVICE_HEARTBEAT / 2)


def test_what_must_be_known_at_once_does_not_wait_for_the_heartbeat(life: Life) -> None:
    life.poll()
    life.hears_wish("joined")
    assert life.poll() is None
    life.membership.hurry()
    assert life.poll() is not None
    assert life.poll() is None


def test_every_answer_brings_the_wish_and_the_versions(life: Life) -> None:
    life.hears_wish("joined")
    life.hears_wish("wish", desired={"paused": True, "stopping": False, "epoch": 3})
    assert life.wishes == [Desired(epoch=2), Desired(paused=True, epoch=3)]
    assert life.membership.versions == {"image_encoder": 4}
    assert life.membership.version_floors == {"image_encoder": 6}


def test_a_link_is_up_while_answers_come(life: Life) -> None:
    assert not life.membership.linked(life.now)
    life.hears_wish("joined")
    assert life.membership.linked(life.now + limits.SERVICE_TIMEOUT - 0.1)
    assert not life.membership.linked(life.now + limits.SERVICE_TIMEOUT)


def test_a_controller_that_forgot_us_is_joined_again_at_once(life: Life) -> None:
    life.poll()
    life.hears_wish("joined")
    assert life.hears("rejoin")
    assert not life.membership.joined
    message = life.poll()
    assert message is not None
    assert message.kind == "join"


def test_a_refusal_for_good_ends_it(life: Life) -> None:
    assert life.hears("refused", reason="other configuration", retry=False)
    assert isinstance(life.membership.refusal, JoinRefusedError)
    assert str(life.membership.refusal) == "other configuration"
    assert life.poll(10.0) is None
    life.now += 5.0
    assert life.poll() is None
    assert life.membership.next_send() > life.now, "its thread has nothing to do, and waits"


def test_a_name_conflict_is_borne_with_patience_and_then_given_up(life: Life) -> None:
    for _ in range(int(limits.NAME_CONFLICT_PATIENCE / limits.SERVICE_HEARTBEAT) + 1):
        assert life.poll() is not None
        life.hears("refused", reason="taken", retry=True)
        assert life.membership.refusal is None
        life.now += limits.SERVICE_HEARTBEAT
    life.hears("refused", reason="taken", retry=True)
    assert life.membership.refusal is not None


def test_patience_begins_anew_after_an_acceptance(life: Life) -> None:
    life.hears("refused", reason="taken", retry=True)
    life.hears_wish("joined")
    life.now += 2 * limits.NAME_CONFLICT_PATIENCE
    life.hears("refused", reason="taken", retry=True)
    assert life.membership.refusal is None


@pytest.mark.parametrize(
    "changed",
    [
        {"desired": {}},
        {"desired": {"paused": "no", "stopping": False, "epoch": 1}},
        {"desired": 4},
        {"versions": {"image_encoder": "4"}},
        {"versions": {"image_encoder": True}},
        {"version_floors": [4]},
        {"version_floors": {b"image_encoder": 4}},
    ],
    ids=str,
)
def test_a_malformed_wish_is_a_wire_error_and_changes_nothing(life: Life, changed: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        life.hears_wish("joined", **changed)
    assert not life.membership.joined
    assert life.wishes == []
    assert life.membership.versions == life.membership.version_floors == {}
    assert not life.membership.linked(life.now)


@pytest.mark.parametrize("fields", [{}, {"retry": "no", "reason": "x"}, {"retry": False}], ids=str)
def test_a_malformed_refusal_is_a_wire_error(life: Life, fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        life.hears("refused", **fields)
    assert life.membership.refusal is None


def test_other_messages_are_left_to_others(life: Life) -> None:
    assert not life.hears("snapshot")
    assert not life.membership.joined


def test_every_run_of_a_process_has_a_name_of_its_own_at_the_hub() -> None:
    first, second = Identity("body", "body"), Identity("body", "body")
    assert first.routing_id != second.routing_id
    assert first.routing_id.decode() not in repr(first)


def test_who_is_refused_after_it_was_a_member_was_displaced(life: Life) -> None:
    life.poll()
    life.hears_wish("joined")
    life.hears("refused", reason="taken over", retry=False)
    assert type(life.membership.refusal) is DisplacedError
    assert DisplacedError.exit_code != JoinRefusedError.exit_code


def test_a_service_says_which_lineage_it_belongs_to_and_begins_anew_when_that_is_over(life: Life) -> None:
    first = life.poll()
    assert first is not None
    assert "lineage" not in first.fields
    life.hears_wish("joined", lineage="of before")
    life.hears("rejoin")
    again = life.poll()
    assert again is not None
    assert (again.kind, again.fields["lineage"]) == ("join", "of before")
    life.hears("refused", reason="taken back", retry=False, begin_anew=True)
    assert type(life.membership.refusal) is TakenBackError
    assert TakenBackError.exit_code == 1, "so that whoever supervises it starts it again"
