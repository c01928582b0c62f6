"""Whole saves and restores, without a socket: services are played, the folder is real."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointing import WritesAtOnce, checkpointing

from ami_controller import checkpointing as checkpointing_module
from ami_controller import restorable
from ami_controller.answers import Outgoing
from ami_controller.checkpoint_files import CheckpointFolder, Found
from ami_controller.checkpoint_writer import Begin, Failed, Write
from ami_controller.registry import Registry
from ami_controller.restoring import misfits, snapshots
from ami_controller.retention import Retention
from ami_shared import limits
from ami_shared.checkpoints import Described, Fetching, Offered, Piece
from ami_shared.errors import WireError
from ami_shared.snapshots import Snapshot
from ami_shared.state import to_files
from ami_shared.wire import Message

OPERATOR = b"\x00op"
BIG = np.arange(limits.STATE_CHUNK // 4 + 1_000, dtype=np.float32)  # more than one piece
STATES: dict[str, dict[str, Any]] = {
    "body": {"interaction/body/loop": {"steps": 30}},
    "ppo": {
        "models/policy": {"weight": BIG},
        "trainers/ppo": {"training": {"updates": 7}, "versions": {"policy": 4}, "intake": {"body": {"frontier": 30}}},
        "data/ppo": {"frames": np.arange(12, dtype=np.uint8)},
    },
}


@dataclass
class Service:
    """A service that takes every cut at once."""

    name: str
    role: str
    incarnation: str = "1"
    offered: Offered = field(default_factory=Offered)
    silent: bool = False
    heard: list[str] = field(default_factory=list)

    def answer(self, message: Message) -> Message | None:
        self.heard.append(message.kind)
        if self.silent:
            return None
        if message.kind == "save":
            checkpoint = message.get("cut", list)[0]
            self.offered.put(checkpoint, [f for name, tree in STATES[self.name].items() for f in to_files(name, tree)])
            return self.says("offer", checkpoint=checkpoint, files=self.offered.sizes(checkpoint))
        if message.kind == "get_part":
            content = self.offered.read(Piece.of(message))
            return Piece.of(message).answer(self.name, self.incarnation, content) if content else None
        if message.kind == "forget":
            self.offered.forget(message.get("checkpoint", str))
        return None

    def says(self, kind: str, **fields: Any) -> Message:
        return Message(kind, self.name, self.incarnation, fields)


class Rig:
    """The controller's side over a folder, its services, and what the operator heard."""

    def __init__(self, directory: Path, agreement: dict[str, Any] | None = None, **options: Any) -> None:
        self.registry = Registry(agreement or {"models.policy.width": 8})
        self.folder = CheckpointFolder(directory)
        self.services = {"body": Service("body", "body"), "ppo": Service("ppo", "trainer")}
        self.side = checkpointing(directory, self.registry, tuple(self.services), **options)
        self.told: list[Message] = []
        self.now = 100.0
        for service in self.services.values():
            self.join(service)

    def join(self, service: Service) -> None:
        about = {"role": service.role, "host": "here", "pid": 1, "agreement": self.registry.agreement, "saves": True}
        fields = about | {"state": "running", "epoch": 0, "statistics": {}}
        peer = f"{service.name}/{service.incarnation}".encode()
        assert self.registry.join(service.says("join", **fields), peer, self.now) is None

    def operator(self, **fields: Any) -> Message:
        wish = Message("save", "operator", "9", {"request": 1} | fields)
        self.deliver(self.side.save(OPERATOR, wish, self.now))
        return self.told[-1]

    def deliver(self, outgoing: Outgoing) -> None:
        waiting = list(outgoing)
        while waiting:
            peer, message = waiting.pop(0)
            if peer == OPERATOR:
                self.told.append(message)
                continue
            name = peer.decode().split("/")[0]
            if (service := self.services[name]) and (answer := service.answer(message)):
                waiting += self.side.heard(peer, answer, self.now)

    @property
    def cut_id(self) -> str:
        assert self.side._saving is not None
        return self.side._saving.cut_id

    def passes(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.deliver(self.side.passed(self.now))

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(50):
            if condition():
                return
            self.passes(0.05)
        raise AssertionError("it did not come to be")


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(restorable, "VERIFY_AGAIN_S", 0.01)
    return Rig(tmp_path / "checkpoints")


def result(rig: Rig) -> Message:
    rig.until(lambda: rig.told[-1].kind == "result")
    return rig.told[-1]


def save(rig: Rig, *names: str) -> None:
    """Let an operator make checkpoints, one after the other."""
    for name in names:
        rig.operator(name=name)
        result(rig)


def save_unnamed(rig: Rig, count: int) -> list[str]:
    """Let an operator make checkpoints without names, and return what they are called."""
    made = []
    for _ in range(count):
        rig.operator()
        made.append(result(rig).get("checkpoint", str))
    return made


def looked_into(rig: Rig, poll_for: Callable[..., Any]) -> None:
    """Wait until a checkpoint that was doubted has been verified."""
    poll_for(lambda: rig.side.restorable._verdict is not None)
    rig.passes()


def test_a_save_collects_every_service_and_ends_with_a_checkpoint(rig: Rig) -> None:
    accepted = rig.operator(name="mine")
    assert (accepted.kind, accepted.get("checkpoint", str)) == ("accepted", "mine")
    done = result(rig)
    assert done.get("ok", bool), done.fields
    manifest = rig.folder.verify("mine")
    assert done.get("bytes", int) == manifest.nbytes > BIG.nbytes
    assert Path(done.get("path", str)) == (rig.folder.directory / "mine").resolve()
    assert manifest.about == {
        "steps": {"body": 30},
        "updates": {"ppo": 7},
        "versions": {"policy": 4},
        "frontiers": {"ppo": {"body": [None, 30]}},
        "left_out": [],
        "named": True,
    }
    assert manifest.services["ppo"]["role"] == "trainer"
    assert "config.yaml" in manifest.files
    assert rig.services["ppo"].heard[-1] == rig.services["body"].heard[-1] == "forget"


def test_a_joining_service_is_given_its_part_and_its_models_come_otherwise(rig: Rig) -> None:
    assert rig.side.restorable.for_member(rig.registry.members["ppo"]) == {}
    save(rig, "mine")
    told = rig.side.restorable.for_member(rig.registry.members["ppo"])
    files = Described.all_of(told["files"])
    assert {file.path for file in files} == {"trainers/ppo.json", "data/ppo.json", "data/ppo.safetensors"}
    fetching = Fetching(told["checkpoint"], files)
    while piece := fetching.wish(rig.now):
        wish = rig.services["ppo"].says("get_part", **piece.fields())
        ((_, part),) = rig.side.heard(b"ppo/1", wish, rig.now)
        fetching.take(part)
    assert fetching.complete
    assert fetching.files()["data/ppo.safetensors"][-12:] == bytes(range(12))


def test_what_does_not_arrive_as_it_was_written_is_refused() -> None:
    fetching = Fetching("c", [Described("a.json", 2, "0" * 64)])
    piece = fetching.wish(0.0)
    assert piece is not None
    fetching.take(piece.answer("controller", "controller", b"{}"))
    with pytest.raises(WireError, match=r"a\.json of checkpoint c did not arrive as it was written"):
        fetching.files()


def test_a_piece_that_does_not_come_is_asked_for_again_and_one_that_comes_twice_is_taken_once() -> None:
    fetching = Fetching("c", [Described("a.json", 4, "")])
    piece = fetching.wish(0.0)
    assert piece is not None
    assert fetching.wish(1.0) is None
    assert fetching.wish(1.0 + limits.CHUNK_PATIENCE) == piece
    for _ in range(2):
        fetching.take(piece.answer("controller", "controller", b"{ "))
    assert fetching.wish(9.0) == Piece("c", "a.json", 2)


def test_two_wishes_at_once_are_one_save(rig: Rig) -> None:
    rig.services["ppo"].silent = True
    rig.operator()
    rig.operator(request=2)
    rig.services["ppo"].silent = False
    rig.until(lambda: len([m for m in rig.told if m.kind == "result"]) == 2)
    assert len(rig.folder.names()) == 1
    assert {m.fields["request"] for m in rig.told} == {1, 2}


def test_a_name_is_refused_while_another_is_saved_or_where_it_is_taken(rig: Rig) -> None:
    rig.operator(name="mine")
    assert "being saved" in rig.operator(name="other").get("reason", str)
    rig.until(rig.folder.names)
    rig.passes()
    assert "there is a mine already" in rig.operator(name="mine").get("reason", str)
    assert "letters" in rig.operator(name="../x").get("reason", str)


def test_a_system_that_is_not_whole_is_not_saved(rig: Rig) -> None:
    rig.registry.leave(rig.services["ppo"].says("leave"), rig.now)
    told = rig.operator()
    assert not told.get("ok", bool)
    assert "ppo cannot be reached" in told.get("reason", str)


def test_a_body_that_takes_no_part_in_checkpoints_hinders_none(rig: Rig) -> None:
    rig.registry.members["body"].saves = False
    rig.operator(name="mine")
    assert result(rig).get("ok", bool)
    manifest = rig.folder.verify("mine")
    assert (list(manifest.services), manifest.about["left_out"]) == (["ppo"], ["body"])
    found = Found(rig.folder, manifest)
    assert misfits(found, rig.registry.agreement, ["body", "ppo"]) == []
    assert misfits(found, rig.registry.agreement, ["body", "ppo", "dreams"]) == ["dreams is not in the checkpoint"]


def test_a_system_of_which_nobody_saves_says_so(rig: Rig) -> None:
    for member in rig.registry.members.values():
        member.saves = False
    assert "none of body, ppo takes part" in rig.operator().get("reason", str)


def test_a_service_that_dies_fails_that_save_with_its_name_and_the_next_succeeds(rig: Rig) -> None:
    rig.services["ppo"].silent = True
    rig.operator(name="first")
    rig.registry.lose(b"ppo/1")
    failed = result(rig)
    assert not failed.get("ok", bool)
    assert "ppo vanished" in failed.get("reason", str)
    assert list(rig.folder.directory.glob("*")) == list(rig.folder.directory.glob(".*")) == []
    assert rig.side.statistics()["trouble"]
    rig.services["ppo"] = Service("ppo", "trainer", "2")
    rig.join(rig.services["ppo"])
    rig.operator(name="second")
    assert result(rig).get("ok", bool)
    assert rig.side.statistics()["trouble"] is None


def test_a_service_that_is_silent_is_asked_again_and_named_in_the_end(rig: Rig) -> None:
    rig.services["ppo"].silent = True
    rig.operator()
    for _ in range(40):
        rig.passes(1.0)
    assert rig.services["ppo"].heard.count("save") >= 20
    assert "ppo" in result(rig).get("reason", str)


def test_a_service_that_cannot_take_part_says_why(rig: Rig) -> None:
    rig.services["body"].silent = True
    rig.operator(name="mine")
    refusal = rig.services["body"].says("unsaved", checkpoint=rig.cut_id, reason="a state that is not kept")
    rig.deliver(rig.side.heard(b"body/1", refusal, rig.now))
    assert "body: a state that is not kept" in result(rig).get("reason", str)


def test_a_name_that_failed_may_be_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(nbytes: int) -> None:
        raise OSError(28, "no space", "/runs/x")

    with monkeypatch.context() as patched:
        patched.setattr(rig.side._folder, "check_space", full)
        rig.operator(name="mine")
        assert not result(rig).get("ok", bool)
    first = rig.services["ppo"].offered._kept[0]
    rig.operator(name="mine")
    assert result(rig).get("ok", bool)
    assert rig.services["ppo"].offered._kept[0] != first, "every cut is one of its own"


def test_a_full_disk_fails_the_save_in_one_line(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(nbytes: int) -> None:
        raise OSError(28, "no space for another checkpoint: 5 MB are needed and 1 MB free", "/runs/x")

    monkeypatch.setattr(rig.side._folder, "check_space", full)
    rig.operator()
    assert result(rig).get("reason", str) == "/runs/x: no space for another checkpoint: 5 MB are needed and 1 MB free"


def test_what_need_not_be_kept_makes_room_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path / "checkpoints")
    before = save_unnamed(rig, 4)
    rig.side._writer._retention = Retention(1, 0, 0, 0)  # type: ignore[attr-defined]

    def room_for_two(nbytes: int) -> None:
        if len(rig.folder.names()) > 1:
            raise OSError(28, "no space", str(rig.folder.directory))

    monkeypatch.setattr(rig.side._folder, "check_space", room_for_two)
    (after,) = save_unnamed(rig, 1)
    assert rig.side.trouble is None
    assert rig.folder.names() == [before[-1], after], "who joined before may still be fetching from the one before"


def test_saves_that_fail_are_tried_less_and_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs every service a copy of its state."""
    rig = Rig(tmp_path / "checkpoints", interval_s=600.0)

    def full(nbytes: int) -> None:
        raise OSError(28, "no space", str(tmp_path))

    with monkeypatch.context() as patched:
        patched.setattr(rig.side._folder, "check_space", full)
        for _ in range(3_600):
            rig.passes(1.0)
    assert 5 <= rig.services["ppo"].heard.count("save") <= 13
    rig.operator()
    assert result(rig).get("ok", bool)
    tried = rig.services["ppo"].heard.count("save")
    rig.services["ppo"].silent = True
    for _ in range(600 + 30 + 10 + 2):
        rig.passes(1.0)
    assert rig.services["ppo"].heard.count("save") > tried + 30, "after a success it is soon tried again"


@pytest.mark.parametrize(
    "files",
    [
        [["../x", 3]],
        [["trainers/other.json", 3]],
        [["models/a.json", 0]],
        [["x"]],
        [],
        [["trainers/ppo.json", True]],
    ],
)
def test_files_that_are_not_a_services_own_are_refused(rig: Rig, files: list[Any]) -> None:
    rig.services["ppo"].silent = True
    rig.operator(name="mine")
    with pytest.raises(WireError):
        rig.side.heard(b"ppo/1", rig.services["ppo"].says("offer", checkpoint=rig.cut_id, files=files), rig.now)


def test_a_trainer_may_not_offer_the_models_of_another(tmp_path: Path) -> None:
    rig = Rig(tmp_path, models_of={"ppo": ["policy"]})
    rig.services["ppo"].silent = True
    rig.operator(name="mine")
    for model, length in (("policy_value", 3), ("image_encoder", 3)):
        offer = rig.services["ppo"].says("offer", checkpoint=rig.cut_id, files=[[f"models/{model}.json", length]])
        with pytest.raises(WireError, match="do not belong to it"):
            rig.side.heard(b"ppo/1", offer, rig.now)
    rig.services["ppo"].silent = False
    assert result(rig).get("ok", bool)


def test_a_version_counts_only_for_a_model_that_is_saved_with_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {**STATES["ppo"]["trainers/ppo"], "versions": {"policy": 4, "image_encoder": 9_000}}
    monkeypatch.setitem(STATES["ppo"], "trainers/ppo", told)
    save(rig, "mine")
    assert rig.folder.verify("mine").about["versions"] == {"policy": 4}


def test_models_whose_trainer_is_absent_are_saved_as_the_hub_has_them(tmp_path: Path) -> None:
    arrays = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    kept = [Snapshot(model, 7, 1.0, arrays) for model in ("frozen_encoder", "policy", "null", "unknown")]
    agreement = {"models.policy.width": 8, "models.frozen_encoder.width": 8, "models.null": None}
    rig = Rig(tmp_path / "checkpoints", agreement, models=kept)
    save(rig, "mine")
    manifest = rig.folder.verify("mine")
    assert manifest.about["versions"] == {"policy": 4, "frozen_encoder": 7}, "the policy is its trainer's"
    assert "models/null.json" not in manifest.files
    assert "models/unknown.json" not in manifest.files, "what nobody describes may fit nothing"
    versions = {"frozen_encoder": 8}
    found = snapshots(Found(rig.folder, manifest), agreement, lambda model: versions.get(model, 0))
    assert [(snapshot.model, snapshot.version) for snapshot in found] == [("frozen_encoder", 8)]
    np.testing.assert_array_equal(found[0].arrays["weight"], arrays["weight"])


def test_a_body_may_not_offer_models(rig: Rig) -> None:
    rig.services["body"].silent = True
    rig.operator(name="mine")
    offer = rig.services["body"].says("offer", checkpoint=rig.cut_id, files=[["models/policy.json", 3]])
    with pytest.raises(WireError, match="do not belong to it"):
        rig.side.heard(b"body/1", offer, rig.now)


def test_two_services_that_offer_one_file_are_named_and_nothing_is_saved(rig: Rig) -> None:
    other = Service("other", "trainer", silent=True)
    rig.services["other"], rig.services["ppo"].silent = other, True
    rig.join(other)
    rig.operator(name="mine")
    for name in ("ppo", "other"):
        offer = rig.services[name].says("offer", checkpoint=rig.cut_id, files=[["models/policy.json", 3]])
        rig.side.heard(f"{name}/1".encode(), offer, rig.now)
    assert rig.side.trouble is not None
    assert "ppo and other both offer models/policy.json" in rig.side.trouble
    assert rig.folder.names() == []


def test_somebody_who_asks_for_what_is_not_there_or_not_its_own_is_refused(rig: Rig) -> None:
    save(rig, "mine")
    others = ("config.yaml", "interaction/body/loop.json", "models/policy.json")
    for path in ("../state.json", "manifest.json", *others):
        wish = rig.services["ppo"].says("get_part", checkpoint="mine", path=path, offset=0)
        with pytest.raises(WireError, match="asks for"):
            rig.side.heard(b"ppo/1", wish, rig.now)


def test_who_was_told_of_the_checkpoint_before_the_last_still_gets_it_and_who_asks_for_another_joins_again(
    rig: Rig,
) -> None:
    save(rig, "one", "two")
    answers = {}
    for name in ("one", "two", "never"):
        wish = rig.services["ppo"].says("get_part", checkpoint=name, path="trainers/ppo.json", offset=0)
        ((_, answer),) = rig.side.heard(b"ppo/1", wish, rig.now)
        answers[name] = answer.kind
    assert answers == {"one": "part", "two": "part", "never": "rejoin"}


def spoil_by_removal(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_by_cutting(folder: Path) -> None:
    path = folder / "trainers" / "ppo.json"
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("spoil", [spoil_by_removal, spoil_by_cutting])
def test_a_checkpoint_that_is_spoilt_under_the_living_gives_way_to_the_one_before(
    rig: Rig, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    save(rig, "one", "two", "three")
    shutil.rmtree(rig.folder.directory / "two")
    spoil(rig.folder.directory / "three")
    wish = rig.services["ppo"].says("get_part", checkpoint="three", path="trainers/ppo.json", offset=0)
    ((_, told),) = rig.side.heard(b"ppo/1", wish, rig.now)
    assert told.kind == "rejoin"
    assert rig.side.restorable.for_member(rig.registry.members["ppo"])["checkpoint"] == "one"
    assert "three cannot be restored" in (rig.side.statistics()["trouble"] or "")
    assert "continue from one" in caplog.text
    save(rig, "four")
    assert rig.side.statistics()["trouble"] is None


def doubts(rig: Rig, name: str, peer: bytes = b"ppo/1", poll_for: Callable[..., Any] | None = None) -> list[str]:
    """A service says that a checkpoint came spoilt; return what it is answered, when that has been looked into."""
    answers = [
        answer.kind for _, answer in rig.side.heard(peer, rig.services["ppo"].says("damaged", checkpoint=name), 0.0)
    ]
    if poll_for:
        looked_into(rig, poll_for)
    return answers


def test_a_service_that_was_given_something_else_gets_another_checkpoint_if_that_one_is_damaged(
    rig: Rig, poll_for: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    save(rig, "one", "two")
    member = rig.registry.members["ppo"]
    assert doubts(rig, "two", poll_for=poll_for) == ["rejoin"]
    assert rig.side.restorable.for_member(member)["checkpoint"] == "two", "it is whole: nothing is lost by what is said"
    assert "two is intact" in caplog.text
    for name, then in (("two", "one"), ("one", None)):
        path = rig.folder.directory / name / "trainers" / "ppo.json"
        path.write_bytes(path.read_bytes().replace(b"7", b"8"))
        assert doubts(rig, name, poll_for=poll_for) == ["rejoin"]
        assert rig.side.restorable.for_member(member).get("checkpoint") == then


def test_strangers_and_doubts_about_other_checkpoints_are_not_heard(rig: Rig) -> None:
    save(rig, "one")
    assert doubts(rig, "one", peer=b"stranger") == []
    assert doubts(rig, "never") == ["rejoin"]
    assert rig.side.restorable._doubted is None
    assert rig.side.restorable.name == "one"


def test_a_file_that_stays_unreadable_costs_its_checkpoint_and_no_more(rig: Rig, poll_for: Callable[..., Any]) -> None:
    save(rig, "one", "two")
    path = rig.folder.directory / "two" / "trainers" / "ppo.json"
    path.unlink()
    path.mkdir()
    wish = rig.services["ppo"].says("get_part", checkpoint="two", path="trainers/ppo.json", offset=0)
    assert rig.side.heard(b"ppo/1", wish, rig.now) == []
    looked_into(rig, poll_for)
    assert rig.side.restorable.name == "one"


def test_a_disk_that_fails_while_it_is_verified_ends_no_doubt(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, poll_for: Callable[..., Any]
) -> None:
    save(rig, "one")

    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(CheckpointFolder, "verify", fails)
    assert doubts(rig, "one", poll_for=poll_for) == ["rejoin"]
    assert rig.side.restorable.name == ""
    save(rig, "two")
    assert rig.side.restorable.name == "two"
    assert rig.folder.manifest("two").number == 2


def test_a_checkpoint_that_was_replaced_under_the_living_gives_way(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, poll_for: Callable[..., Any]
) -> None:
    save(rig, "one", "two")
    monkeypatch.setitem(STATES, "ppo", {"trainers/ppo": {"training": {"updates": 8}}})
    save(rig, "three")
    shutil.rmtree(rig.folder.directory / "two")
    shutil.copytree(rig.folder.directory / "three", rig.folder.directory / "two")
    rig.side.restorable.newest, rig.side.restorable._before = rig.side.restorable._before, None
    assert rig.side.restorable.name == "two"
    assert doubts(rig, "two", poll_for=poll_for) == ["rejoin"]
    assert rig.side.restorable.name == "three"


def test_an_error_of_the_moment_costs_no_checkpoint(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, poll_for: Callable[..., Any]
) -> None:
    save(rig, "one")
    wish = rig.services["ppo"].says("get_part", checkpoint="one", path="trainers/ppo.json", offset=0)

    def too_many_files(*_: Any) -> bytes:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as during:
        during.setattr(CheckpointFolder, "read", too_many_files)
        assert rig.side.heard(b"ppo/1", wish, rig.now) == []
    looked_into(rig, poll_for)
    assert rig.side.restorable.name == "one"
    assert [answer.kind for _, answer in rig.side.heard(b"ppo/1", wish, rig.now)] == ["part"]
    with pytest.raises(WireError, match="asks for byte"):
        rig.side.heard(
            b"ppo/1",
            rig.services["ppo"].says("get_part", checkpoint="one", path="trainers/ppo.json", offset=1 << 52),
            rig.now,
        )


def test_numbers_grow_whatever_is_removed_and_a_run_taken_back_keeps_what_it_was_taken_back_to(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "checkpoints", retention=Retention(2, 0, 0, 0))
    good, diverged = save_unnamed(rig, 2)
    rig.side._run.restored_from = good
    rig.side._run.restored_behind = rig.folder.last_number()
    rig.folder.remove(diverged)
    _, later, last = save_unnamed(rig, 3)
    assert rig.folder.names() == [good, later, last]
    assert [rig.folder.manifest(name).number for name in rig.folder.names()] == [1, 4, 5]


def test_numbers_go_on_where_the_folder_of_checkpoints_was_away_for_a_while(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "checkpoints")
    save(rig, "one", "two")
    rig.folder.directory.rename(tmp_path / "away")
    again = Rig(tmp_path / "checkpoints", run=rig.side._run)
    save(again, "three")
    for name in ("one", "two"):
        (tmp_path / "away" / name).rename(again.folder.directory / name)
    assert again.folder.names() == ["one", "two", "three"]


def test_what_an_operator_named_stays(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "checkpoints", retention=Retention(1, 0, 0, 0))
    save(rig, "before-the-experiment")
    *_, before, newest = save_unnamed(rig, 4)
    assert rig.folder.names() == ["before-the-experiment", before, newest]


@pytest.mark.parametrize("name", ["latest", "null"])
def test_a_name_that_nobody_could_restore_by_is_refused(rig: Rig, name: str) -> None:
    assert f"{name} is reserved in checkpoint=" in rig.operator(name=name).get("reason", str)


def test_an_empty_name_is_refused_and_not_taken_for_none(rig: Rig) -> None:
    assert rig.operator(name="").kind == "result"
    assert not rig.operator(name="").get("ok", bool)


def test_a_body_that_was_away_during_saves_goes_on_from_the_last_one_that_it_was_part_of(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STATES, "second", {"interaction/second/loop": {"steps": 12}})
    rig.services["second"] = Service("second", "body")
    rig.join(rig.services["second"])
    save(rig, "both")
    rig.registry.leave(rig.services["second"].says("leave"), rig.now)
    save(rig, "alone", "alone-again")
    back = rig.services["second"] = Service("second", "body", "2")
    rig.join(back)
    told = rig.side.restorable.for_member(rig.registry.members["second"])
    assert told["checkpoint"] == "both"
    ((path, *_),) = told["files"]
    wish = back.says("get_part", checkpoint="both", path=path, offset=0)
    ((_, part),) = rig.side.heard(b"second/2", wish, rig.now)
    assert part.kind == "part"
    assert rig.side.restorable.for_member(rig.registry.members["body"])["checkpoint"] == "alone-again"
    shutil.rmtree(rig.folder.directory / "both")
    ((_, told_again),) = rig.side.heard(b"second/2", wish, rig.now)
    assert told_again.kind == "rejoin"
    assert rig.side.restorable.for_member(rig.registry.members["second"]) == {}
    save(rig, "both-again")
    assert rig.side.restorable.for_member(rig.registry.members["second"])["checkpoint"] == "both-again"


def test_a_run_that_began_anew_gives_nobody_what_was_before(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATES, "second", {"interaction/second/loop": {"steps": 12}})
    rig.services["second"] = Service("second", "body")
    rig.join(rig.services["second"])
    save(rig, "before")
    anew = Rig(rig.folder.directory)
    save(anew, "after")
    anew.join(Service("second", "body", "2"))
    assert anew.side.restorable.for_member(anew.registry.members["second"]) == {}
    shutil.rmtree(rig.folder.directory / "after")
    anew.side.restorable._lose(anew.side.restorable.newest, "it is gone")  # type: ignore[arg-type]
    assert anew.side.restorable.name == ""


def test_what_a_run_began_from_elsewhere_is_there_for_bodies_that_come_later(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STATES, "second", {"interaction/second/loop": {"steps": 12}})
    rig.services["second"] = Service("second", "body")
    rig.join(rig.services["second"])
    save(rig, "elsewhere")
    begun = Rig(tmp_path / "other", found=Found(rig.folder, rig.folder.verify("elsewhere")))
    save(begun, "first", "second")
    begun.join(Service("second", "body", "2"))
    assert begun.side.restorable.for_member(begun.registry.members["second"])["checkpoint"] == "elsewhere"


def test_a_body_that_is_new_begins_anew(rig: Rig) -> None:
    save(rig, "mine")
    rig.services["newcomer"] = Service("newcomer", "body")
    rig.join(rig.services["newcomer"])
    assert rig.side.restorable.for_member(rig.registry.members["newcomer"]) == {}


def test_the_age_of_a_checkpoint_of_the_future_is_none(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    save(rig, "mine")
    monkeypatch.setattr(checkpointing_module.time, "time", lambda: 0.0)
    assert rig.side.statistics()["age_s"] == 0.0


def test_what_a_run_was_taken_back_from_is_not_gone_on_from_either_when_the_newest_is_spoilt(rig: Rig) -> None:
    save(rig, "good", "diverged")
    rig.side._run.restored_from = "good"
    rig.side._run.restored_behind = rig.folder.last_number()
    save(rig, "after")
    shutil.rmtree(rig.folder.directory / "after")
    wish = rig.services["ppo"].says("get_part", checkpoint="after", path="trainers/ppo.json", offset=0)
    ((_, told),) = rig.side.heard(b"ppo/1", wish, rig.now)
    assert told.kind == "rejoin"
    assert rig.side.restorable.name == "good"


@pytest.mark.parametrize(
    "odd",
    [
        {"training": None},
        {"training": {"updates": "x"}},
        {"versions": 5},
        {"versions": {"m": "x"}},
        {"intake": [1]},
        {"intake": {"body": 3}},
    ],
    ids=str,
)
def test_what_a_service_of_another_make_remembers_does_not_keep_the_system_from_a_save(
    rig: Rig, odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STATES, "ppo", {"trainers/ppo": odd})
    rig.operator(name="mine")
    assert result(rig).get("ok", bool)
    about = rig.folder.verify("mine").about
    assert (about["updates"], about["versions"], about["frontiers"]) == ({"ppo": None}, {}, {"ppo": {}})


class Full:
    """A file on a disk that is full."""

    def write(self, content: bytes) -> None:
        raise OSError(28, "No space left on device", "frames")

    def close(self) -> None:
        raise OSError(28, "No space left on device", "frames")


def test_a_disk_that_fills_up_under_several_files_fails_the_save_and_leaves_nothing(tmp_path: Path) -> None:
    writer = WritesAtOnce(CheckpointFolder(tmp_path), Retention(), lambda: None)
    writer.work(Begin("cut", "one", 10, [], [], ()))
    assert writer._draft
    writer._draft._open = {path: (Full(), sha256()) for path in ("data/a", "data/b")}
    writer.work(Write("cut", "ppo", "data/a", b"x", last=False))
    assert writer.take_results() == [Failed("cut", "frames: No space left on device")]
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_saves_after_the_first_minute_and_then_at_its_interval(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "checkpoints", interval_s=600.0)
    rig.passes(59.0)
    assert not rig.side.busy
    rig.passes(2.0)
    rig.until(lambda: len(rig.folder.names()) == 1)
    rig.until(lambda: not rig.side.busy)
    rig.passes(500.0)
    assert not rig.side.busy
    rig.passes(110.0)
    rig.until(lambda: len(rig.folder.names()) == 2)


def test_what_was_restored_is_given_until_there_is_a_newer_one(rig: Rig) -> None:
    save(rig, "mine")
    found = Found(rig.folder, rig.folder.verify("mine"))
    other = Rig(rig.folder.directory.parent / "elsewhere", found=found)
    assert other.side.restorable.for_member(other.registry.members["ppo"])["checkpoint"] == "mine"
    wish = other.services["ppo"].says("get_part", checkpoint="mine", path="trainers/ppo.json", offset=0)
    assert other.side.heard(b"ppo/1", wish, other.now)
    other.operator(name="newer")
    result(other)
    assert other.side.restorable.for_member(other.registry.members["ppo"])["checkpoint"] == "newer"


def test_who_offers_what_nobody_saves_is_told_to_forget_it(rig: Rig) -> None:
    offer = rig.services["ppo"].says("offer", checkpoint="of/long-ago", files=[["trainers/ppo.json", 2]])
    ((peer, told),) = rig.side.heard(b"ppo/1", offer, rig.now)
    assert (peer, told.kind, told.fields) == (b"ppo/1", "forget", {"checkpoint": "of/long-ago"})


def test_a_save_that_is_being_named_when_its_time_is_up_is_reported_as_what_it_becomes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.operator(name="mine")
    saving = rig.side._saving
    assert saving is not None
    take = saving._writer.take_results
    monkeypatch.setattr(saving._writer, "take_results", lambda: [] if saving._committing else take())
    rig.until(lambda: saving._committing)
    rig.passes(1_000.0)
    assert rig.told[-1].kind == "accepted"
    monkeypatch.setattr(saving._writer, "take_results", take)
    assert result(rig).get("ok", bool)
    assert rig.folder.names() == ["mine"]
