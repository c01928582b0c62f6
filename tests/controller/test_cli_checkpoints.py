"""`ami checkpoints`, over a real folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from ami_controller.checkpoint_files import CheckpointFolder, Draft, Manifest
from ami_controller.cli import checkpoints
from ami_controller.cli.main import build_parser, run_checkpoints
from ami_shared.errors import ConfigurationError


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    for n, name in enumerate(("old", "new")):
        draft = Draft(tmp_path, name)
        draft.append("trainers/ppo.json", b"{}")
        draft.finish("trainers/ppo.json")
        about = {"steps": {"body": 1_200 + n}, "updates": {"ppo": 7}, "versions": {"policy_value": 4 + n}}
        services = {"ppo": {"role": "trainer", "files": ["trainers/ppo.json"]}}
        draft.commit(Manifest(name, 100.0 + 3_600 * n, {}, services, draft.described, about, {}))
    return CheckpointFolder(tmp_path)


@pytest.fixture
def console() -> Console:
    return Console(width=160, highlight=False, color_system=None)


def spoil(folder: CheckpointFolder, name: str) -> Path:
    path = folder.directory / name / "trainers" / "ppo.json"
    path.write_bytes(b"[]")
    return path


def test_the_list_tells_age_size_steps_and_versions(
    folder: CheckpointFolder, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.show_list(folder, console) == 0
    _, old, new = capsys.readouterr().out.splitlines()
    assert old.startswith("old")
    assert new.startswith("new")
    for part in ("body 1,201", "ppo 7", "policy_value v5", "0.0 MB"):
        assert part in new


def test_a_path_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[/y]" / "[red]"
    folder.mkdir(parents=True)
    assert run_checkpoints(build_parser().parse_args(["checkpoints", "--dir", str(folder)])) == 0
    assert str(folder) in capsys.readouterr().out.replace("\n", "")


def test_a_folder_that_may_not_be_read_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refused)
    for words in (["checkpoints"], ["checkpoints", "verify"]):
        with pytest.raises(ConfigurationError, match="Permission denied"):
            run_checkpoints(build_parser().parse_args([*words, "--dir", str(tmp_path)]))


def test_an_empty_folder_is_said(tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.show_list(CheckpointFolder(tmp_path / "none"), console) == 0
    assert "no checkpoint in" in capsys.readouterr().out


def test_verify_names_what_is_broken(
    folder: CheckpointFolder, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoil(folder, "new")
    assert checkpoints.verify(folder, [], console) == 1
    told = capsys.readouterr().out
    assert "old: complete, 1 files" in told
    assert str(path) in told.replace("\n", "")
    assert checkpoints.verify(folder, ["old"], console) == 0


def test_what_is_removed_while_all_are_verified_is_not_broken(
    folder: CheckpointFolder, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, *_ = folder.names()
    before = folder.all_names
    first = iter([["gone meanwhile", here]])
    monkeypatch.setattr(folder, "all_names", lambda: next(first, None) or before())
    assert checkpoints.verify(folder, [], console) == 0
    assert checkpoints.verify(folder, ["gone meanwhile"], console) == 1


def test_a_folder_without_a_manifest_is_listed_as_broken(
    folder: CheckpointFolder, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.directory / "new" / "manifest.json").unlink()
    assert checkpoints.show_list(folder, console) == 1
    assert "manifest.json" in capsys.readouterr().out


def test_the_last_good_one_stays(folder: CheckpointFolder, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folder, "new")
    with pytest.raises(ConfigurationError, match="last intact checkpoint"):
        checkpoints.remove(folder, "old")
    checkpoints.remove(folder, "new")
    assert folder.all_names() == ["old"]
    assert capsys.readouterr().out == "new removed\n"
    with pytest.raises(ConfigurationError, match="there is no checkpoint other"):
        checkpoints.remove(folder, "other")


def test_show_prints_the_manifest(folder: CheckpointFolder, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.show(folder, "new")
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["bytes"], told["about"]["updates"]) == ("new", 2, {"ppo": 7})
