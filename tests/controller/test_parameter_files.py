"""Snapshots on the disk: whole or not at all, and only of the models that the system has."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ami_controller import parameter_files
from ami_controller.parameter_files import ParameterFiles, ParameterKeeper
from ami_shared.errors import ConfigurationError
from ami_shared.snapshots import Snapshot

AGREEMENT = {"seed": 1, "models.image_encoder.width": 8, "models.trunk": [1, 2]}


def snapshot(version: int, model: str = "image_encoder") -> Snapshot:
    arrays = {"weight": np.full((2, 3), version, np.float32), "steps": np.asarray(version)}
    return Snapshot(model, version, 1.0, arrays)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "parameters"


@pytest.fixture
def files(folder: Path) -> ParameterFiles:
    return ParameterFiles(folder, AGREEMENT)


def test_a_new_run_has_learned_nothing(files: ParameterFiles) -> None:
    assert files.load() == []


def test_what_was_written_last_is_read(files: ParameterFiles, folder: Path) -> None:
    for written in (snapshot(3), snapshot(4), snapshot(2, "policy_value")):
        files.write(written)
    first, second = ParameterFiles(folder, AGREEMENT).load()
    assert (first.model, first.version, second.model, second.version) == ("image_encoder", 4, "policy_value", 2)
    np.testing.assert_array_equal(first.arrays["weight"], np.full((2, 3), 4, np.float32))
    assert not list(folder.glob("*.tmp"))


def test_a_run_is_taken_back_wholly_or_not_at_all(
    files: ParameterFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("image_encoder", "policy_value"):
        files.write(snapshot(9, model))
    write_whole = parameter_files.write_whole

    def full(path: Path, parts: Any) -> None:
        if "policy_value" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_whole(path, parts)

    back = [snapshot(1_009, model) for model in ("image_encoder", "policy_value")]
    monkeypatch.setattr(parameter_files, "write_whole", full)
    with pytest.raises(ConfigurationError, match="No space left on device: make room first"):
        files.write_all(back)
    assert not list(folder.glob("*.draft"))
    assert [kept.version for kept in ParameterFiles(folder, AGREEMENT).load()] == [9, 9]
    monkeypatch.undo()
    files.write_all(back)
    assert [kept.version for kept in ParameterFiles(folder, AGREEMENT).load()] == [1_009, 1_009]
    assert not list(folder.glob("*.draft"))


def test_a_model_that_was_added_later_must_fit_too(folder: Path) -> None:
    first, more = {"models.a.width": 8, "models.b": None}, {"models.a.width": 8, "models.b.width": 256}
    ParameterFiles(folder, first).write(snapshot(3, "a"))
    ParameterFiles(folder, more).write(snapshot(4, "b"))
    other = {"models.b.width": 512}
    with pytest.raises(ConfigurationError, match=r"models\.b\.width: 256 there, 512 here"):
        ParameterFiles(folder, other)
    partial = ParameterFiles(folder, other, partial=True)
    assert [kept.model for kept in partial.load()] == ["a"]
    partial.write(snapshot(5, "b"))
    with pytest.raises(ConfigurationError, match=r"models\.a\.width: 8 there, 9 here"):
        ParameterFiles(folder, {"models.a.width": 9})


def test_drafts_of_a_take_back_that_was_broken_off_are_removed(folder: Path, files: ParameterFiles) -> None:
    files.write(snapshot(3))
    (folder / "image_encoder.draft").write_bytes(bytes(100))
    assert [kept.version for kept in files.load()] == [3]
    assert not list(folder.glob("*.draft"))


def test_parameters_of_a_system_with_more_models_are_its_own(folder: Path, files: ParameterFiles) -> None:
    files.write(snapshot(3))
    (kept,) = ParameterFiles(folder, {**AGREEMENT, "models.inverse_dynamics.hidden": 32}).load()
    assert kept.version == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "longer"])
def test_a_broken_file_is_named_and_set_aside(
    damage: str, files: ParameterFiles, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files.write(snapshot(3))
    files.write(snapshot(2, "policy_value"))
    path = folder / "image_encoder.snapshot"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    damaged = {
        "flip": bytes(flipped),
        "cut": content[:-1],
        "empty": b"",
        "foreign": b"\0" * 90,
        "longer": content + b"x",
    }
    path.write_bytes(damaged[damage])
    assert [found.model for found in files.load()] == ["policy_value"]
    assert "image_encoder.snapshot is broken" in caplog.text
    assert (folder / "image_encoder.broken").exists()
    assert not path.exists()


def test_every_cut_of_a_file_is_found(files: ParameterFiles, folder: Path) -> None:
    files.write(snapshot(3))
    path = folder / "image_encoder.snapshot"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert files.load() == []


def test_a_file_of_another_name_is_not_taken_for_that_model(files: ParameterFiles, folder: Path) -> None:
    files.write(snapshot(3))
    (folder / "image_encoder.snapshot").rename(folder / "policy_value.snapshot")
    assert files.load() == []


def test_a_death_while_writing_leaves_the_old_file(
    files: ParameterFiles, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    files.write(snapshot(3))

    def die(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(OSError, match="No space"):
        files.write(snapshot(4))
    (found,) = ParameterFiles(folder, AGREEMENT).load()
    assert found.version == 3


def test_parameters_of_other_models_are_refused_with_a_way_out(files: ParameterFiles, folder: Path) -> None:
    files.write(snapshot(3))
    assert ParameterFiles(folder, {**AGREEMENT, "seed": 2}).load()
    with pytest.raises(ConfigurationError, match=r"models\.image_encoder\.width: 8 there, 16 here.*another run_dir"):
        ParameterFiles(folder, {**AGREEMENT, "models.image_encoder.width": 16})


def refuse(*_: object, **__: object) -> bytes:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_what_may_not_be_read_is_neither_broken_nor_forgotten(
    files: ParameterFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(snapshot(3))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ConfigurationError, match=r"image_encoder\.snapshot: Permission denied"):
            files.load()
    assert [loaded.version for loaded in files.load()] == [3]


def test_what_is_broken_and_cannot_be_set_aside_is_said(
    files: ParameterFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(snapshot(3))
    (folder / "image_encoder.snapshot").write_bytes(b"no snapshot")
    monkeypatch.setattr(parameter_files, "rename", refuse)
    with pytest.raises(ConfigurationError, match="cannot be set aside: Permission denied"):
        files.load()


def test_models_whose_list_could_not_be_written_are_listed_with_the_next_snapshot(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ParameterFiles(folder, AGREEMENT).write(snapshot(3))
    wider = {**AGREEMENT, "models.image_encoder.width": 16}
    changed = ParameterFiles(folder, wider, partial=True)

    def full(path: Path, parts: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(parameter_files, "write_whole", full)
        with pytest.raises(OSError, match="No space"):
            changed.write(snapshot(4))
    changed.write(snapshot(5))
    assert [loaded.version for loaded in ParameterFiles(folder, wider).load()] == [5]


def test_a_model_that_became_another_is_not_found_again_once_anything_was_written(folder: Path) -> None:
    before = {"models.policy.width": 1, "models.image_encoder.width": 1}
    first = ParameterFiles(folder, before)
    first.write(snapshot(7, "policy"))
    first.write(snapshot(7))
    after = {**before, "models.policy.width": 2}
    changed = ParameterFiles(folder, after, partial=True)
    assert [s.model for s in changed.load()] == ["image_encoder"]
    changed.write(snapshot(8))  # and killed before there is anything of the new policy
    assert [s.model for s in ParameterFiles(folder, after).load()] == ["image_encoder"]
    assert (folder / "policy.other").exists()


@pytest.mark.parametrize("content", ["", "[", "[]", "3"])
def test_a_spoilt_list_of_models_is_refused_with_a_way_out(content: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "models.json").write_text(content)
    with pytest.raises(ConfigurationError, match="another run_dir"):
        ParameterFiles(folder, AGREEMENT)
    (folder / "models.json").write_text(json.dumps({k: v for k, v in AGREEMENT.items() if k != "seed"}))
    assert ParameterFiles(folder, AGREEMENT).load() == []


class Store:
    """Snapshots in memory."""

    def __init__(self) -> None:
        self.kept = snapshot(1)

    def newer_than(self, versions: Mapping[str, int]) -> list[Snapshot]:
        return [self.kept] if self.kept.version > versions.get(self.kept.model, 0) else []


def test_the_keeper_writes_what_is_newer_now_and_then_and_at_the_end(
    files: ParameterFiles, monkeypatch: pytest.MonkeyPatch, poll_for: Any
) -> None:
    store, written = Store(), []
    write = files.write
    monkeypatch.setattr(files, "write", lambda newer: (written.append(newer), write(newer)))
    keeper = ParameterKeeper(files, store.newer_than, {}, interval_s=0.01)
    keeper.start()
    poll_for(lambda: files.load())
    store.kept = snapshot(2)
    keeper.close()
    (found,) = files.load()
    assert found.version == 2
    assert len(written) == 2


def test_what_the_files_have_already_is_not_written_again(files: ParameterFiles, folder: Path) -> None:
    keeper = ParameterKeeper(files, Store().newer_than, {"image_encoder": 1})
    keeper.start()
    keeper.close()
    assert not folder.exists()


def test_a_full_disk_is_trouble_until_there_is_room(
    files: ParameterFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(newer: Snapshot) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/run/parameters")

    keeper = ParameterKeeper(files, Store().newer_than, {})
    write = files.write
    monkeypatch.setattr(files, "write", full)
    keeper.start()
    keeper.close()
    assert keeper.trouble == "parameters cannot be written to /run/parameters: No space left on device"
    assert "make room" in caplog.text
    monkeypatch.setattr(files, "write", write)
    keeper.close()
    assert keeper.trouble is None
    assert len(files.load()) == 1


def test_parameters_that_cannot_be_written_as_a_message_hinder_no_others(
    files: ParameterFiles, caplog: pytest.LogCaptureFixture
) -> None:
    odd = Snapshot("odd", 2, 1.0, {"n" * 300: np.zeros(2, np.float32)})
    keeper = ParameterKeeper(files, lambda versions: [odd, snapshot(3)] if not versions else [], {})
    keeper.start()
    keeper.close()
    assert [kept.model for kept in files.load()] == ["image_encoder"]
    assert "version 2 of odd is not saved" in caplog.text
