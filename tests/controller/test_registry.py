from __future__ import annotations

from typing import Any

import pytest

from ami_controller.registry import BACK_SOON_S, Registry
from ami_shared import limits
from ami_shared.errors import WireError
from ami_shared.wire import Message

AGREEMENT = {"seed": 0, "observation.height": 84}


@pytest.fixture
def registry() -> Registry:
    return Registry(AGREEMENT)


def join(name: str = "body", incarnation: str = "1", **changed: Any) -> Message:
    fields: dict[str, Any] = {
        "role": "body", "host": "here", "pid": 7, "agreement": AGREEMENT, "state": "starting", "epoch": -1,
        "statistics": {},
    }  # fmt: skip
    return Message("join", name, incarnation, fields | changed)


def heartbeat(name: str = "body", incarnation: str = "1", **changed: Any) -> Message:
    fields: dict[str, Any] = {"state": "running", "epoch": 2, "statistics": {"steps": 5}}
    return Message("heartbeat", name, incarnation, fields | changed)


def test_a_service_that_joins_is_a_member(registry: Registry) -> None:
    assert registry.join(join(), b"body/1", now=3.0) is None
    member = registry.members["body"]
    assert (member.role, member.host, member.pid, member.incarnation) == ("body", "here", 7, "1")
    assert (member.heard_at, member.state, member.epoch) == (3.0, "starting", -1)
    assert member.routing_id == b"body/1"
    assert registry.living() == [member]


def test_a_heartbeat_brings_state_epoch_and_statistics(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=3.0)
    member = registry.heartbeat(heartbeat(), now=4.0)
    assert member is registry.members["body"]
    assert (member.state, member.epoch, member.statistics, member.heard_at) == ("running", 2, {"steps": 5}, 4.0)


def test_a_heartbeat_of_a_stranger_or_of_another_incarnation_is_no_member_s(registry: Registry) -> None:
    assert registry.heartbeat(heartbeat(), now=0.0) is None
    registry.join(join(), b"body/1", now=0.0)
    assert registry.heartbeat(heartbeat(incarnation="2"), now=0.0) is None
    assert registry.members["body"].state == "starting"


def test_joining_twice_is_harmless(registry: Registry) -> None:
    assert registry.join(join(), b"body/1", now=0.0) is None
    assert registry.join(join(), b"body/1", now=1.0) is None
    assert len(registry.members) == 1


def test_a_name_in_use_is_refused_for_now_and_says_by_whom(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=0.0)
    refusal = registry.join(join(incarnation="2", host="there"), b"body/1", now=1.0)
    assert refusal is not None
    assert refusal.retry
    assert "process 7 on here" in refusal.reason
    assert registry.members["body"].incarnation == "1"


def test_the_name_of_a_lost_member_can_be_taken_over(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=0.0)
    registry.expire(limits.SERVICE_TIMEOUT + 0.1)
    assert registry.join(join(incarnation="2"), b"body/1", now=4.0) is None
    assert registry.members["body"].incarnation == "2"
    assert registry.superseded(heartbeat(incarnation="1"))
    assert not registry.superseded(heartbeat(incarnation="2"))


def test_nobody_is_superseded_by_a_lost_member(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=0.0)
    registry.expire(9.0)
    assert not registry.superseded(heartbeat(incarnation="2"))
    assert not registry.superseded(heartbeat(name="other"))


@pytest.mark.parametrize(
    ("agreement", "told"),
    [
        ({"seed": 1, "observation.height": 84}, "seed: 1 in body, 0 in the controller"),
        ({"seed": 0}, "observation.height: absent in body, 84 in the controller"),
        ({**AGREEMENT, "more": 3}, "more: 3 in body, absent in the controller"),
        ({**AGREEMENT, "more": None}, "more: None in body, absent in the controller"),
    ],
)
def test_another_configuration_is_refused_for_good_and_says_what_differs(
    registry: Registry, agreement: dict[str, Any], told: str
) -> None:
    refusal = registry.join(join(agreement=agreement), b"body/1", now=0.0)
    assert refusal is not None
    assert not refusal.retry
    assert told in refusal.reason
    assert "84 there" not in refusal.reason
    assert registry.members == {}


def test_a_long_list_of_differences_is_cut(registry: Registry) -> None:
    refusal = registry.join(join(agreement={**AGREEMENT, **{f"key{i}": i for i in range(20)}}), b"body/1", now=0.0)
    assert refusal is not None
    assert refusal.reason.endswith(" and 14 more")
    assert refusal.reason.count(" in body, ") == 6


def test_a_silent_member_is_lost_once_and_back_with_its_next_heartbeat(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=0.0)
    registry.heartbeat(heartbeat(), now=10.0)
    assert registry.expire(10.0 + limits.SERVICE_TIMEOUT) == []
    (lost,) = registry.expire(10.1 + limits.SERVICE_TIMEOUT)
    assert lost.name == "body"
    assert lost.lost
    assert registry.living() == []
    assert registry.expire(99.0) == []
    registry.heartbeat(heartbeat(), now=100.0)
    assert registry.living() == [lost]


def test_a_member_whose_socket_is_gone_is_lost_at_once(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=0.0)
    assert registry.lose(b"body/2") is None
    assert registry.lose(b"body/1") is registry.members["body"]
    assert registry.lose(b"body/1") is None
    assert registry.members["body"].lost


def test_a_young_controller_awaits_whom_its_predecessor_may_have_known() -> None:
    young = Registry(AGREEMENT, begun_at=100.0)
    assert young.awaits(["body"], 99.0 + BACK_SOON_S)
    assert not young.awaits(["body"], 100.0 + BACK_SOON_S)


def test_only_a_member_itself_can_leave(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=0.0)
    assert registry.leave(Message("leave", "body", "2"), 0.0) is None
    assert registry.leave(Message("leave", "other", "1"), 0.0) is None
    left = registry.leave(Message("leave", "body", "1"), 0.0)
    assert left is not None
    assert left.name == "body"
    assert registry.members == {}


@pytest.mark.parametrize("field", ["role", "host", "pid", "agreement", "state", "epoch", "statistics"])
@pytest.mark.parametrize("value", [None, object()], ids=["absent", "of another type"])
def test_a_malformed_join_is_a_wire_error_and_admits_nobody(registry: Registry, field: str, value: Any) -> None:
    with pytest.raises(WireError, match=field):
        registry.join(join(**{field: value}), b"body/1", now=0.0)
    assert registry.members == {}


@pytest.mark.parametrize("field", ["state", "epoch", "statistics"])
def test_a_malformed_heartbeat_is_a_wire_error_and_changes_nothing(registry: Registry, field: str) -> None:
    registry.join(join(), b"body/1", now=0.0)
    with pytest.raises(WireError, match=field):
        registry.heartbeat(heartbeat(**{field: None}), now=1.0)
    member = registry.members["body"]
    assert (member.state, member.epoch, member.statistics, member.heard_at) == ("starting", -1, {}, 0.0)


@pytest.mark.parametrize("name", ["a/b", "../up", "a b", "", "x" * 65, "[red]", "a\nb"])
def test_a_name_that_is_none_is_a_wire_error(registry: Registry, name: str) -> None:
    with pytest.raises(WireError, match="name"):
        registry.join(join(name), b"body/1", now=0.0)
    assert registry.members == {}


@pytest.mark.parametrize(
    "agreement",
    [{b"seed": 0}, {"seed": b"\xff"}, {"seed": [[1]] * 9_000}, {"x" * 9_000: "y" * 9_000}, {"seed": {"a": None}}, {}],
    ids=["a key of bytes", "bytes", "a long list", "long texts", "a map", "nothing"],
)
def test_a_configuration_of_any_form_is_refused_in_a_line_of_bounded_length(
    registry: Registry, agreement: dict[Any, Any]
) -> None:
    refusal = registry.join(join(agreement=agreement), b"body/1", now=0.0)
    assert refusal is not None
    assert len(refusal.reason) < 2_000


def test_a_name_is_taken_over_where_that_is_asked_for(registry: Registry) -> None:
    registry.join(join(), b"body/1", now=0.0)
    refusal = registry.join(join(incarnation="2"), b"body/2", now=1.0)
    assert refusal is not None
    assert "--take-over" in refusal.reason
    assert registry.join(join(incarnation="2", take_over=True), b"body/2", now=1.0) is None
    assert registry.members["body"].incarnation == "2"
    assert registry.superseded(join(incarnation="1"))


def test_of_very_many_services_the_one_lost_first_gives_way(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_MEMBERS", 2)
    registry.join(join("a"), b"a/1", now=0.0)
    registry.join(join("b"), b"b/1", now=1.0)
    refusal = registry.join(join("c"), b"c/1", now=2.0)
    assert refusal is not None
    assert "no room" in refusal.reason
    assert registry.join(join("a"), b"a/1", now=3.0) is None
    registry.lose(b"b/1")
    assert registry.join(join("c"), b"c/1", now=4.0) is None
    assert set(registry.members) == {"a", "c"}
