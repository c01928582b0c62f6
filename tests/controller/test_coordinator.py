"""Whole conversations with the controller, without a socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointing import checkpointing

from ami_controller.coordinator import LONGEST_COMMAND_S, RESTART_S, Coordinator, Outgoing
from ami_controller.lifecycle import Lifecycle
from ami_controller.registry import BACK_SOON_S, Registry
from ami_shared import limits
from ami_shared.checkpoints import Piece
from ami_shared.errors import WireError
from ami_shared.experience import Fetch
from ami_shared.gate import Desired
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Array, Message

AGREEMENT = {"seed": 0}


class KeptInMemory:
    """A parameter store and a learning record that are lists."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self.points: list[tuple[str, Any]] = []
        self.pictures: list[tuple[str, str, int, tuple[int, ...]]] = []

    def versions(self) -> dict[str, int]:
        return dict(self.kept)

    def newer_than(self, model: str, version: int) -> Message | None:
        kept = self.kept.get(model, 0)
        return Snapshot(model, kept, 0.0, {}).to_message("trainer", "1") if kept > version else None

    def put_points(self, service: str, points: Any) -> None:
        self.points += [(service, point) for point in points]

    def put_picture(self, service: str, name: str, step: int, pixels: Array) -> None:
        self.pictures.append((service, name, step, pixels.shape))


class Hub:
    """A coordinator, and short words for what peers say to it."""

    def __init__(self, folder: Path) -> None:
        self.memory = KeptInMemory()
        self.registry, self.lifecycle = Registry(AGREEMENT, "of now"), Lifecycle()
        self.floors = {"image_encoder": 3}
        self.changes: list[Desired] = []
        self.now = 100.0
        self.coordinator = Coordinator(
            self.registry,
            self.lifecycle,
            self.memory,
            self.memory,
            checkpointing(folder, self.registry, ("body",)),
            self.floors,
            lambda now: {"system": "running", "asked_at": now},
            lambda: self.changes.append(self.lifecycle.desired),
            wall=lambda: 777.0,
        )

    def says(self, kind: str, name: str = "body", incarnation: str = "1", /, **fields: Any) -> Outgoing:
        return self.passes(Message(kind, name, incarnation, fields))

    def passes(self, message: Message) -> Outgoing:
        return self.coordinator.handle(f"{message.sender}/{message.incarnation}".encode(), message, self.now)

    def join(self, name: str = "body", incarnation: str = "1", **changed: Any) -> Outgoing:
        about = {"role": "body", "host": "here", "pid": 7, "agreement": AGREEMENT, "statistics": {}}
        return self.says("join", name, incarnation, **about | {"state": "starting", "epoch": -1} | changed)

    def heartbeat(self, name: str = "body", incarnation: str = "1", state: str = "running", epoch: int = 0) -> Outgoing:
        return self.says("heartbeat", name, incarnation, state=state, epoch=epoch, statistics={})

    def operator(self, kind: str, **fields: Any) -> Outgoing:
        message = Message(kind, "operator", "9", {"request": 4, "timeout_s": 5.0} | fields)
        return self.coordinator.handle(b"\x00op", message, self.now)


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)


def kinds(outgoing: Outgoing) -> list[tuple[bytes, str]]:
    return [(peer, message.kind) for peer, message in outgoing]


def test_a_join_is_answered_with_wish_versions_and_floors(hub: Hub) -> None:
    hub.memory.kept = {"image_encoder": 2}
    ((peer, answer),) = hub.join()
    assert (peer, answer.kind) == (b"body/1", "joined")
    assert answer.fields == {
        "desired": Desired().to_fields(),
        "checkpoint": {},
        "lineage": "of now",
        "versions": {"image_encoder": 2},
        "version_floors": {"image_encoder": 3},
    }


def test_who_has_lived_through_what_the_run_was_taken_back_from_is_to_begin_anew(hub: Hub) -> None:
    ((_, answer),) = hub.join(lineage="of before")
    assert (answer.kind, answer.get("retry", bool), answer.get("begin_anew", bool)) == ("refused", False, True)
    assert "taken back" in answer.get("reason", str)
    assert hub.registry.living() == []
    ((_, answer),) = hub.join(lineage="of now")
    assert answer.kind == "joined"


def test_whoever_asks_is_told_what_all_must_agree_on(hub: Hub) -> None:
    ((peer, answer),) = hub.operator("agreement")
    assert (peer, answer.kind) == (b"\x00op", "result")
    assert answer.fields == {"request": 4, "ok": True, "agreement": AGREEMENT}


@pytest.mark.parametrize("kind", ["join", "heartbeat"])
def test_who_asks_what_time_it_is_is_told_with_the_answer(hub: Hub, kind: str) -> None:
    hub.join()
    about = {"role": "body", "host": "here", "pid": 7, "agreement": AGREEMENT, "statistics": {}}
    ((_, told),) = hub.says(kind, **about, state="running", epoch=0, asked=12.5)
    assert (told.fields["asked"], told.fields["clock"]) == (12.5, 777.0)
    ((_, untold),) = hub.says(kind, **about, state="running", epoch=0)
    assert not {"asked", "clock"} & untold.fields.keys()


def test_a_trainer_s_wish_for_missing_records_reaches_the_body_as_it_is(hub: Hub) -> None:
    wish = Fetch("ppo", "body", "1", (3, 9)).to_message("1")
    assert hub.passes(wish) == [], "nobody of that name is there"
    hub.join()
    assert hub.passes(wish) == [(b"body/1", wish)]
    hub.coordinator.unreachable(b"body/1", hub.now)
    assert hub.passes(wish) == []
    with pytest.raises(WireError):
        hub.says("fetch", "ppo", body="body", range=[9])


def test_a_heartbeat_is_answered_with_the_wish(hub: Hub) -> None:
    hub.join()
    assert kinds(hub.heartbeat()) == [(b"body/1", "wish")]


def test_a_heartbeat_of_somebody_unknown_is_asked_to_join_again(hub: Hub) -> None:
    assert kinds(hub.heartbeat()) == [(b"body/1", "rejoin")]


def test_a_name_conflict_is_refused_for_now_and_the_holder_is_probed(hub: Hub) -> None:
    hub.join()
    outgoing = hub.join(incarnation="2")
    assert kinds(outgoing) == [(b"body/2", "refused"), (b"body/1", "wish")]
    assert outgoing[0][1].fields["retry"] is True


def test_a_probe_that_reaches_nobody_frees_the_name(hub: Hub) -> None:
    hub.join()
    hub.join(incarnation="2")
    hub.coordinator.unreachable(b"body/1", hub.now)
    assert kinds(hub.join(incarnation="2")) == [(b"body/2", "joined")]


def test_who_lost_its_name_to_another_process_is_told_so_for_good(hub: Hub) -> None:
    hub.join()
    hub.coordinator.unreachable(b"body/1", hub.now)
    hub.join(incarnation="2")
    ((peer, answer),) = hub.heartbeat(incarnation="1")
    assert (peer, answer.kind, answer.fields["retry"]) == (b"body/1", "refused", False)


def test_another_configuration_is_refused_for_good(hub: Hub) -> None:
    ((_, answer),) = hub.join(agreement={"seed": 5})
    assert (answer.kind, answer.fields["retry"]) == ("refused", False)
    assert "seed: 5 in body, 0 in the controller" in answer.fields["reason"]


def test_nobody_joins_from_a_socket_whose_routing_id_changes_with_its_connection(hub: Hub) -> None:
    with pytest.raises(WireError, match="without a routing id"):
        hub.coordinator.handle(b"\0auto", Message("join", "body", "1"), hub.now)


def test_a_pause_is_accepted_passed_on_at_once_and_answered_when_everybody_confirmed(hub: Hub) -> None:
    hub.join("body")
    hub.join("trainer")
    outgoing = hub.operator("pause")
    assert kinds(outgoing) == [(b"\x00op", "accepted"), (b"body/1", "wish"), (b"trainer/1", "wish")]
    assert outgoing[0][1].fields == {"request": 4}
    assert outgoing[1][1].fields["desired"] == {"paused": True, "stopping": False, "epoch": 1}
    assert hub.changes == [Desired(paused=True, epoch=1)]
    hub.now += 0.25
    assert kinds(hub.heartbeat("body", state="paused", epoch=1)) == [(b"body/1", "wish")]
    outgoing = hub.heartbeat("trainer", state="paused", epoch=1)
    assert kinds(outgoing) == [(b"trainer/1", "wish"), (b"\x00op", "result")]
    assert outgoing[1][1].fields == {
        "request": 4, "ok": True, "took_s": {"body": 0.25, "trainer": 0.25}, "unconfirmed": [], "gone": [],
    }  # fmt: skip


def test_a_second_pause_is_answered_at_once_and_changes_nothing(hub: Hub) -> None:
    hub.join()
    hub.operator("pause")
    hub.heartbeat(state="paused", epoch=1)
    outgoing = hub.operator("pause", request=5)
    assert kinds(outgoing) == [(b"\x00op", "accepted"), (b"body/1", "wish"), (b"\x00op", "result")]
    assert outgoing[2][1].fields["ok"] is True
    assert len(hub.changes) == 1


def test_a_command_that_runs_out_of_time_names_who_did_not_confirm(hub: Hub) -> None:
    hub.join()
    hub.operator("pause", timeout_s=2)
    assert hub.coordinator.passed(hub.now + 1.9) == []
    ((peer, answer),) = hub.coordinator.passed(hub.now + 2.0)
    assert (peer, answer.kind) == (b"\x00op", "result")
    assert (answer.fields["ok"], answer.fields["unconfirmed"]) == (False, ["body"])


def test_a_member_that_falls_silent_ends_the_wait_and_is_named_as_unconfirmed(hub: Hub) -> None:
    hub.join()
    hub.operator("pause", timeout_s=60.0)
    ((_, answer),) = hub.coordinator.passed(hub.now + limits.SERVICE_TIMEOUT + 0.1)
    assert (answer.fields["ok"], answer.fields["gone"]) == (False, ["body"])
    assert answer.fields["unconfirmed"] == ["body"]


def test_a_member_that_is_lost_already_cannot_confirm_a_pause(hub: Hub) -> None:
    hub.join()
    hub.coordinator.unreachable(b"body/1", hub.now)
    _, (_, answer) = hub.operator("pause")
    assert (answer.fields["ok"], answer.fields["unconfirmed"]) == (False, ["body"])


def test_a_shutdown_does_not_need_the_lost_and_says_that_they_did_not_confirm(hub: Hub) -> None:
    hub.join()
    hub.coordinator.unreachable(b"body/1", hub.now)
    assert kinds(hub.operator("shutdown", timeout_s=60.0)) == [(b"\x00op", "accepted")], "it may be back soon"
    hub.now += RESTART_S
    ((_, answer),) = hub.coordinator.passed(hub.now)
    assert (answer.fields["ok"], answer.fields["gone"]) == (False, ["body"]), "cut off, it may still be acting"
    assert "body cannot be reached" in answer.fields["unsaved"]


def test_a_save_before_the_end_waits_for_a_service_that_died_just_now(hub: Hub) -> None:
    hub.join(saves=True)
    hub.coordinator.unreachable(b"body/1", hub.now)
    hub.operator("shutdown", timeout_s=60.0)
    hub.now += 5.0
    hub.join("body", "2", saves=True)
    hub.coordinator.passed(hub.now)
    assert "save" in [message.kind for _, message in hub.coordinator.passed(hub.now)]


def test_a_save_that_lost_a_service_waits_for_it_to_come_back_and_is_tried_again(hub: Hub) -> None:
    hub.join(saves=True)
    hub.operator("shutdown", timeout_s=60.0)
    hub.coordinator.passed(hub.now)
    hub.coordinator.unreachable(b"body/1", hub.now)
    for _ in range(5):
        hub.now += 1.0
        assert not is_told_to_end(hub.coordinator.passed(hub.now))
    hub.join("body", "2", saves=True)
    hub.coordinator.passed(hub.now)
    ((_, question),) = hub.coordinator.passed(hub.now)
    cut = question.fields["cut"][0]
    ((_, piece),) = hub.says("offer", "body", "2", checkpoint=cut, files=[["interaction/body/loop.json", 2]])
    outgoing = hub.passes(Piece.of(piece).answer("body", "2", b"{}"))
    assert is_told_to_end(outgoing + hub.coordinator.passed(hub.now))
    ((_, result),) = hub.says("leave", "body", "2")
    assert result.fields["checkpoint"] == cut.split("/")[0]


def test_nor_does_it_forget_a_service_that_crashed_and_said_goodbye(hub: Hub) -> None:
    hub.join(saves=True)
    hub.says("leave")
    assert kinds(hub.operator("shutdown", timeout_s=60.0)) == [(b"\x00op", "accepted")]


def test_a_save_that_takes_all_the_time_there_is_is_not_tried_again_and_is_the_reason(hub: Hub) -> None:
    hub.join(saves=True)
    hub.operator("shutdown", timeout_s=10.0)
    hub.coordinator.passed(hub.now)
    while hub.now < 109.0:
        hub.now += 0.5
        hub.heartbeat()
        outgoing = hub.coordinator.passed(hub.now)
        if is_told_to_end(outgoing):
            break
    ((_, result),) = hub.says("leave")
    assert result.fields["unsaved"] == "the save takes too long"
    assert hub.now < 109.0


def test_who_has_been_gone_for_long_is_not_waited_for_at_the_end(hub: Hub) -> None:
    hub.join(saves=True)
    hub.coordinator.unreachable(b"body/1", hub.now)
    hub.now += BACK_SOON_S
    _, (_, answer) = hub.operator("shutdown", timeout_s=60.0)
    assert "body cannot be reached" in answer.fields["unsaved"]


def test_all_who_wish_for_the_end_wait_for_its_save_and_hear_what_came_of_it(hub: Hub) -> None:
    hub.join(saves=True)
    hub.operator("shutdown", timeout_s=60.0)
    ((_, question),) = hub.coordinator.passed(hub.now)
    again = Message("shutdown", "ami up", "1", {"request": 9, "timeout_s": 120.0})
    assert not is_told_to_end(hub.passes(again)), "a second wish does not break the save off"
    cut = question.fields["cut"][0]
    ((_, piece),) = hub.says("offer", checkpoint=cut, files=[["interaction/body/loop.json", 2]])
    hub.passes(Piece.of(piece).answer("body", "1", b"{}"))
    hub.coordinator.passed(hub.now)
    results = [message.fields for _, message in hub.says("leave")]
    name = cut.split("/")[0]
    assert [(told["request"], told["checkpoint"]) for told in results] == [(4, name), (9, name)]


def test_the_end_waits_for_its_save_no_longer_than_the_least_patient(hub: Hub) -> None:
    hub.join(saves=True)
    hub.operator("shutdown", timeout_s=120.0)
    hub.coordinator.passed(hub.now)
    hub.passes(Message("shutdown", "again", "1", {"request": 9, "timeout_s": 5.0}))
    hub.now += 3.9
    assert not is_told_to_end(hub.heartbeat() + hub.coordinator.passed(hub.now))
    hub.now += 0.2
    assert is_told_to_end(hub.heartbeat() + hub.coordinator.passed(hub.now))


def test_who_is_not_expected_and_long_lost_is_forgotten(hub: Hub) -> None:
    hub.join()
    hub.join("second")
    hub.coordinator.unreachable(b"body/1", hub.now)
    hub.coordinator.unreachable(b"second/1", hub.now)
    hub.now += limits.BODY_IS_GONE
    hub.coordinator.passed(hub.now)
    assert set(hub.registry.members) == {"body", "second"}
    hub.now += 1.0
    hub.coordinator.passed(hub.now)
    assert set(hub.registry.members) == {"body"}
    assert kinds(hub.heartbeat("second")) == [(b"second/1", "rejoin")]


@pytest.mark.parametrize(("state", "is_confirmed"), [("running", False), ("stopping", True)])
def test_a_connection_that_is_cut_during_a_shutdown_confirms_nothing_by_itself(
    hub: Hub, state: str, is_confirmed: bool
) -> None:
    hub.join()
    hub.operator("shutdown")
    hub.heartbeat(state=state)
    hub.coordinator.unreachable(b"body/1", hub.now)
    ((_, answer),) = hub.coordinator.passed(hub.now)
    assert (answer.fields["ok"], answer.fields["gone"]) == (is_confirmed, [] if is_confirmed else ["body"])


def test_a_shutdown_is_answered_when_everybody_has_left(hub: Hub) -> None:
    hub.join()
    hub.operator("shutdown")
    outgoing = hub.says("leave")
    assert kinds(outgoing) == [(b"\x00op", "result")]
    assert list(outgoing[0][1].fields["took_s"]) == ["body"]


def is_told_to_end(outgoing: Outgoing) -> bool:
    return any(message.fields.get("desired", {}).get("stopping") for _, message in outgoing)


def test_a_save_before_the_end_may_take_longer_than_a_command_may_be_on_its_way(hub: Hub) -> None:
    hub.join(saves=True)
    accepted = hub.operator("shutdown", timeout_s=60.0, given=hub.now)
    assert kinds(accepted) == [(b"\x00op", "accepted")]
    ((_, question),) = hub.coordinator.passed(hub.now)
    hub.now += limits.STALE_COMMAND + 5.0
    assert not is_told_to_end(hub.heartbeat())
    outgoing = hub.says("unsaved", checkpoint=question.fields["cut"][0], reason="no room")
    assert not is_told_to_end(outgoing), "what failed is tried once more"
    hub.coordinator.passed(hub.now)
    ((_, question),) = hub.coordinator.passed(hub.now)
    outgoing = hub.says("unsaved", checkpoint=question.fields["cut"][0], reason="no room")
    assert is_told_to_end(outgoing + hub.coordinator.passed(hub.now))
    ((peer, result),) = hub.says("leave")
    assert (peer, result.kind, result.fields["unsaved"]) == (
        b"\x00op", "result", f"checkpoint {question.fields['cut'][0].split('/')[0]} was abandoned: body: no room",
    )  # fmt: skip


def test_the_operator_is_told_what_was_saved_before_the_end(hub: Hub) -> None:
    hub.join(saves=True)
    hub.operator("shutdown", timeout_s=60.0)
    ((_, question),) = hub.coordinator.passed(hub.now)
    cut = question.fields["cut"][0]
    ((_, piece),) = hub.says("offer", checkpoint=cut, files=[["interaction/body/loop.json", 2]])
    outgoing = hub.passes(Piece.of(piece).answer("body", "1", b"{}"))
    assert is_told_to_end(outgoing + hub.coordinator.passed(hub.now))
    ((_, result),) = hub.says("leave")
    assert result.fields["checkpoint"] == cut.split("/")[0]
    assert "unsaved" not in result.fields


def test_the_operator_is_told_why_nothing_was_saved_before_the_end(hub: Hub) -> None:
    _, (_, result) = hub.operator("shutdown")
    assert result.fields["unsaved"] == "body cannot be reached: a checkpoint needs the whole system"


def test_an_end_that_nobody_waits_for_saves_first_and_answers_nobody(hub: Hub) -> None:
    hub.join(saves=True)
    ((_, question),) = hub.coordinator.shut_down(hub.now) + hub.coordinator.passed(hub.now)
    cut = question.fields["cut"][0]
    ((_, piece),) = hub.says("offer", checkpoint=cut, files=[["interaction/body/loop.json", 2]])
    outgoing = hub.passes(Piece.of(piece).answer("body", "1", b"{}"))
    assert is_told_to_end(outgoing + hub.coordinator.passed(hub.now))
    assert hub.says("leave") == []
    assert hub.coordinator.shut_down(hub.now) == []


def test_the_end_waits_for_a_save_that_was_under_way_only_as_long_as_the_operator_does(hub: Hub) -> None:
    hub.join(saves=True)
    hub.operator("save")
    hub.operator("shutdown", timeout_s=10.0)
    for _ in range(7):
        hub.now += 1.0
        assert not is_told_to_end(hub.heartbeat() + hub.coordinator.passed(hub.now))
    hub.now += 1.0
    assert is_told_to_end(hub.heartbeat() + hub.coordinator.passed(hub.now))


def test_who_joins_a_paused_system_hears_of_the_pause(hub: Hub) -> None:
    hub.operator("pause")
    ((_, answer),) = hub.join()
    assert answer.fields["desired"]["paused"] is True


@pytest.mark.parametrize(
    "timeout_s", [0, -1, 0.0, LONGEST_COMMAND_S + 1, float("nan"), float("inf"), "5", None, True], ids=str
)
@pytest.mark.parametrize("command", ["pause", "resume", "shutdown"])
def test_a_command_with_a_malformed_timeout_is_a_wire_error_and_changes_nothing(
    hub: Hub, command: str, timeout_s: Any
) -> None:
    with pytest.raises(WireError, match="timeout_s"):
        hub.operator(command, timeout_s=timeout_s)
    assert hub.lifecycle.desired == Desired()
    assert hub.changes == []
    assert hub.coordinator.passed(hub.now + 1e6) == []


@pytest.mark.parametrize("kind", ["pause", "status"])
def test_a_request_without_a_number_is_a_wire_error(hub: Hub, kind: str) -> None:
    with pytest.raises(WireError, match="request"):
        hub.operator(kind, request="4")


def test_a_status_is_told_to_whoever_asks(hub: Hub) -> None:
    ((peer, answer),) = hub.operator("status")
    assert (peer, answer.kind) == (b"\x00op", "result")
    assert answer.fields == {"request": 4, "ok": True, "status": {"system": "running", "asked_at": 100.0}}


def test_parameters_are_given_when_they_are_newer(hub: Hub) -> None:
    hub.memory.kept = {"image_encoder": 5}
    ((peer, snapshot),) = hub.says("get_parameters", model="image_encoder", newer_than=4)
    assert (peer, snapshot.kind, snapshot.fields["version"]) == (b"body/1", "snapshot", 5)
    assert hub.says("get_parameters", model="image_encoder", newer_than=4) == [], "once in a while is enough"
    hub.now += 1.0
    assert hub.says("get_parameters", model="image_encoder", newer_than=4) != []
    hub.now += 1.0
    assert hub.says("get_parameters", model="image_encoder", newer_than=5) == []
    assert hub.says("get_parameters", model="unknown", newer_than=0) == []


@pytest.mark.parametrize(
    "fields", [{}, {"model": "m"}, {"model": 1, "newer_than": 1}, {"model": "m", "newer_than": "1"}]
)
def test_a_malformed_request_for_parameters_is_a_wire_error(hub: Hub, fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        hub.says("get_parameters", **fields)


def test_metrics_of_members_are_recorded_and_those_of_strangers_are_not(hub: Hub) -> None:
    hub.says("metrics", points=[["loss", 0.5, 3, 12.0]])
    assert hub.memory.points == []
    hub.join()
    assert hub.says("metrics", points=[["loss", 0.5, 3, 12.0], ["kl", float("nan"), 3, 12.0], ["n", 2, 3, 12]]) == []
    assert hub.memory.points[0] == ("body", ("loss", 0.5, 3, 12.0))
    assert len(hub.memory.points) == 3
    assert [type(part) for part in hub.memory.points[2][1]] == [str, float, int, float]


@pytest.mark.parametrize(
    "point",
    [["loss", 0.5, 3], [5, 0.5, 3, 1.0], ["loss", "0.5", 3, 1.0],
     ["loss", 0.5, 3.0, 1.0], ["loss", 0.5, 3, None], "x", 5,
     ["loss", 0.5, 1 << 63, 1.0], ["loss", 0.5, -1, 1.0], ["loss", 0.5, 3, -1.0], ["loss", 0.5, 3, 1e300],
     ["loss", 0.5, 3, float("nan")]],
    ids=str,
)  # fmt: skip
def test_a_malformed_point_is_a_wire_error_and_nothing_of_its_batch_is_recorded(hub: Hub, point: Any) -> None:
    hub.join()
    with pytest.raises(WireError, match="point"):
        hub.says("metrics", points=[["loss", 0.5, 3, 12.0], point])
    assert hub.memory.points == []


def picture(pixels: Array | None, name: str = "body", **fields: Any) -> Message:
    arrays = {} if pixels is None else {"pixels": pixels}
    return Message("picture", name, "1", {"name": "view", "step": 3} | fields, arrays)


def test_pictures_of_members_are_recorded_and_those_of_strangers_are_not(hub: Hub) -> None:
    pixels = np.zeros((2, 5, 3), np.uint8)
    hub.passes(picture(pixels))
    assert hub.memory.pictures == []
    hub.join()
    hub.passes(picture(pixels))
    assert hub.memory.pictures == [("body", "view", 3, (2, 5, 3))]


@pytest.mark.parametrize(
    "message",
    [
        picture(None),
        picture(np.zeros((2, 5), np.uint8)),
        picture(np.zeros((3, 2, 5), np.uint8)),
        picture(np.zeros((2, 5, 3), np.float32)),
        picture(np.zeros((0, 5, 3), np.uint8)),
        picture(np.zeros((2, 5, 3), np.uint8), step="3"),
        Message("picture", "body", "1", {"step": 1}, {"pixels": np.zeros((2, 5, 3), np.uint8)}),
    ],
    ids=["absent", "grey", "channels first", "floats", "empty", "step", "no name"],
)
def test_a_malformed_picture_is_a_wire_error(hub: Hub, message: Message) -> None:
    hub.join()
    with pytest.raises(WireError):
        hub.passes(message)
    assert hub.memory.pictures == []


def test_versions_that_the_system_ever_knew_never_shrink_and_are_remembered(hub: Hub) -> None:
    hub.memory.kept = {"image_encoder": 2}
    hub.coordinator.passed(hub.now)
    assert hub.floors == {"image_encoder": 3}
    assert hub.changes == []
    hub.memory.kept = {"image_encoder": 4, "other": 1}
    hub.coordinator.passed(hub.now)
    assert hub.floors == {"image_encoder": 4, "other": 1}
    assert len(hub.changes) == 1
    hub.memory.kept = {}
    hub.coordinator.passed(hub.now)
    assert hub.floors == {"image_encoder": 4, "other": 1}
    assert len(hub.changes) == 1


def test_a_message_of_an_unknown_type_is_a_wire_error(hub: Hub) -> None:
    for kind in ("snapshot", "joined", "accepted", ""):
        with pytest.raises(WireError, match="unknown message type"):
            hub.says(kind)


def test_a_socket_that_is_nobody_s_can_be_unreachable(hub: Hub) -> None:
    hub.coordinator.unreachable(b"whoever", hub.now)


def test_a_command_that_was_on_its_way_for_too_long_is_not_executed(hub: Hub) -> None:
    ((_, told),) = hub.operator("clock")
    given = told.get("clock", float)
    assert given == hub.now
    hub.now += limits.STALE_COMMAND + 1
    assert hub.operator("pause", given=given) == []
    assert hub.operator("save", given=given) == []
    assert not hub.lifecycle.desired.paused
    assert hub.operator("pause", given=hub.now - 1.0)
    assert hub.lifecycle.desired.paused
