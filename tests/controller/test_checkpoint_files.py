"""Checkpoints on the disk: whole or not there, verified to the last bit, and kept by rule."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ami_controller.checkpoint_files import CheckpointError, CheckpointFolder, Draft, Found, Manifest, is_safe
from ami_controller.restoring import LATEST, find, misfitting_values
from ami_controller.retention import Retention
from ami_shared.errors import ConfigurationError

FILES = {
    "models/m.json": b"{}",
    "models/m.safetensors": b"weights" * 100,
    "interaction/body/loop.json": b'{"steps": 3}',
}


def write(directory: Path, name: str, created: float = 1.0, number: int = 0) -> Manifest:
    draft = Draft(directory, name)
    for path, content in FILES.items():
        draft.append(path, content[:3])
        draft.append(path, content[3:])
        draft.finish(path)
    services = {"body": {"role": "body", "files": ["interaction/body/loop.json"]}}
    about, run = {"versions": {"m": 2}}, {"epoch": 1}
    manifest = Manifest(name, created, {"seed": 0}, services, draft.described, about, run, number)
    draft.commit(manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def test_what_was_written_is_verified_and_read(folder: CheckpointFolder) -> None:
    written = write(folder.directory, "one")
    assert folder.verify("one") == written
    assert folder.names() == ["one"]
    assert folder.read("one", "models/m.safetensors", 7, 7) == b"weights"
    assert written.nbytes == sum(map(len, FILES.values()))
    assert [file[0] for file in written.files_of("body")] == ["interaction/body/loop.json"]
    assert written.files_of("stranger") == []


def test_a_draft_is_no_checkpoint_until_it_is_committed(folder: CheckpointFolder) -> None:
    draft = Draft(folder.directory, "one")
    draft.append("models/m.json", b"{}")
    draft.finish("models/m.json")
    assert folder.all_names() == []
    draft.abandon()
    assert list(folder.directory.iterdir()) == []


def test_a_name_is_used_once(folder: CheckpointFolder) -> None:
    write(folder.directory, "one")
    with pytest.raises(FileExistsError):
        Draft(folder.directory, "one")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change_epoch(path: Path) -> None:
    path.write_text(path.read_text().replace('"epoch": 1', '"epoch": 2'))


def change_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "one bit": ("models/m.safetensors", flip, "content differs from what was saved"),
    "one bit of JSON": ("interaction/body/loop.json", flip, "content differs from what was saved"),
    "cut short": ("models/m.safetensors", lambda path: os.truncate(path, 5), "5 bytes, but 700 were saved"),
    "gone": ("models/m.json", Path.unlink, "No such file"),
    "too many": ("models/extra.json", lambda path: path.write_bytes(b"{}"), "not part of the checkpoint"),
    "manifest gone": ("manifest.json", Path.unlink, "No such file"),
    "manifest torn": ("manifest.json", lambda path: os.truncate(path, 40), "cannot be read"),
    "manifest changed": ("manifest.json", change_epoch, "digest"),
    "manifest of another format": ("manifest.json", change_format, "format 2, this code reads 1"),
    "manifest is a list": ("manifest.json", lambda path: path.write_text("[]"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_one_names_the_file_and_the_next_older_is_taken(folder: CheckpointFolder, damage: str) -> None:
    write(folder.directory, "old", created=1.0)
    write(folder.directory, "new", created=2.0)
    path, spoil, why = DAMAGES[damage]
    spoil(folder.directory / "new" / path)
    with pytest.raises(CheckpointError) as error:
        folder.verify("new")
    assert path in str(error.value)
    assert why in str(error.value)
    complaints: list[CheckpointError] = []
    newest = folder.newest_whole(complaints.append)
    assert newest is not None
    assert newest.name == "old"
    assert list(map(str, complaints)) == [str(error.value)]


@pytest.mark.parametrize("stray", [".DS_Store", "models/.manifest.json.swp", "data/Thumbs.db", ".hidden/any"])
def test_what_a_file_manager_leaves_breaks_nothing(folder: CheckpointFolder, stray: str) -> None:
    write(folder.directory, "one")
    path = folder.directory / "one" / stray
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    assert folder.verify("one").name == "one"


def test_checkpoints_that_may_not_be_read_are_no_reason_to_begin_anew(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder.directory, "one")
    (folder.directory / "a-file").touch()
    (folder.directory / "an-empty-folder").mkdir()
    (folder.directory / "a-loop").mkdir()
    (folder.directory / "a-loop" / "manifest.json").symlink_to("manifest.json")
    assert find(folder, LATEST, None)[0] is not None

    (folder.directory / "lost+found").mkdir()

    def refuse(path: Path, *_: object) -> None:
        assert "lost+found" not in str(path), "no name of a checkpoint"
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigurationError, match="Permission denied: a run's checkpoints must be readable"):
        find(folder, LATEST, None)


def test_where_all_are_broken_nobody_says_that_there_are_none(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder.directory, "one")
    (folder.directory / "one" / "manifest.json").write_bytes(b"[]")
    assert find(folder, LATEST, None) == (None, None)
    assert "none of the checkpoints" in caplog.text


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_in_silence(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigurationError, match="is its disk mounted"):
        find(folder, LATEST, None, last=3)
    assert find(folder, None, None, last=3) == (None, None)
    write(folder.directory, "two", 1.0, 2)
    found, _ = find(folder, LATEST, None, last=3)
    assert found is not None
    assert found.manifest.name == "two"
    assert "the last checkpoint of this run, number 3, is gone or damaged" in caplog.text


def test_nothing_is_written_where_the_disk_was_mounted(folder: CheckpointFolder, tmp_path: Path) -> None:
    if not (other := Path("/dev/shm")).is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    folder.directory.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=other) as disk:
        folder.directory.symlink_to(disk)
        with folder.lock():
            folder.check_space(1)
            folder.directory.unlink()  # as where it was mounted
            with pytest.raises(OSError, match="is that one mounted"):
                folder.check_space(1)
            assert not folder.directory.exists()
            folder.directory.mkdir()
            with pytest.raises(OSError, match="is that one mounted"):
                folder.check_space(1)


def test_a_folder_that_vanished_from_its_disk_is_made_again(folder: CheckpointFolder) -> None:
    folder.directory.mkdir()
    with folder.lock():
        shutil.rmtree(folder.directory)
        folder.check_space(1)
    assert folder.directory.is_dir()


def test_a_run_is_not_taken_back_once_more_by_a_checkpoint_that_it_made_itself(
    folder: CheckpointFolder, tmp_path: Path
) -> None:
    """Whoever restarts a controller gives it the same words again."""
    write(tmp_path / "elsewhere", "good", 1.0, 1)
    _, taken_back = find(folder, str(tmp_path / "elsewhere" / "good"), None)
    write(folder.directory, "good", 2.0, 1)
    write(folder.directory, "after", 3.0, 2)
    found, now = find(folder, str(tmp_path / "elsewhere" / "good"), taken_back, 0)
    assert found is not None
    assert (found.manifest.name, now) == ("after", None)


def test_models_that_only_one_side_has_do_not_differ(folder: CheckpointFolder) -> None:
    written = replace(write(folder.directory, "one"), agreement={"models.old.width": 1, "models.both.width": 2})
    found = Found(folder, written)
    assert misfitting_values(found, {"models.new.width": 3, "models.old": None, "models.both.width": 2}) == []
    (told,) = misfitting_values(found, {"models.both.width": 3, "models.new.width": 3})
    assert told == "models.both.width: 2 in the checkpoint, 3 in this configuration"


def test_an_empty_or_missing_folder_has_none(folder: CheckpointFolder) -> None:
    assert folder.newest_whole() is None
    folder.directory.mkdir()
    assert folder.newest_whole() is None


def test_a_copied_or_renamed_checkpoint_is_as_good(folder: CheckpointFolder) -> None:
    write(folder.directory, "one")
    shutil.copytree(folder.directory / "one", folder.directory / "moved")
    assert folder.verify("moved").name == "moved"


def test_litter_of_a_save_that_died_is_removed(folder: CheckpointFolder) -> None:
    write(folder.directory, "one")
    draft = Draft(folder.directory, "two")
    draft.append("models/m.json", b"{")
    draft.finish("models/m.json")
    (folder.directory / ".three.removed").mkdir()
    folder.clear_litter()
    assert [path.name for path in folder.directory.iterdir()] == ["one"]


def test_removing_leaves_nothing(folder: CheckpointFolder) -> None:
    write(folder.directory, "one")
    folder.remove("one")
    assert list(folder.directory.iterdir()) == []


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder.directory.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=70 << 20))
    folder.check_space(1 << 20)
    with pytest.raises(OSError, match="167 MB must be free, 67 of them to spare; 73 MB are"):
        folder.check_space(100_000_000)


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../b", "a//b", "", "a/.hidden", "a\\b/c", "a/b\n", "a/b/c/d/e"]
)
def test_a_path_that_leaves_the_checkpoint_is_not_safe(path: str) -> None:
    assert not is_safe(path)
    assert is_safe("interaction/body-2.x/agent.safetensors")


class PowerCut(Exception):
    """Everything ends here."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let the power fail at the n-th sync, rename or write."""
    state = {"left": 1_000, "made": 0}

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            state["made"] += 1
            if state["made"] > state["left"]:
                raise PowerCut
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "mkdir", counted(Path.mkdir))
    return state


def test_wherever_writing_dies_the_newest_whole_one_is_found_and_no_litter_stays(
    folder: CheckpointFolder, calls: dict[str, int]
) -> None:
    write(folder.directory, "old", created=1.0)
    before = calls["made"]
    write(folder.directory, "probe", created=0.0)
    steps = calls["made"] - before
    folder.remove("probe")
    assert steps >= 10
    for died_at in range(steps + 1):
        calls["made"], calls["left"] = 0, died_at
        saved = False
        try:
            write(folder.directory, "new", created=2.0)
            saved = True
        except PowerCut:
            pass
        calls["left"] = 1_000_000
        folder.clear_litter()
        newest = folder.newest_whole()
        assert newest is not None
        there = sorted(path.name for path in folder.directory.iterdir())
        assert newest.name == "new" if saved else newest.name in ("old", "new")
        assert there == sorted({"old", newest.name}), f"litter after step {died_at}"
        if "new" in there:
            folder.remove("new")


def test_everything_is_synced_before_it_gets_its_name(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    named: list[Path] = []

    def note(file: int, sync: Callable[[int], None] = os.fsync) -> None:
        sync(file)
        about = os.fstat(file)
        synced[about.st_ino] = about.st_mtime_ns

    def rename(path: Path, target: Path, real: Callable[[Path, Path], Path] = Path.replace) -> Path:
        if path.is_file():
            return real(path, target)
        for part in (path, *path.rglob("*")):
            about = part.stat()
            assert synced.get(about.st_ino) == about.st_mtime_ns, f"{part} was changed after it was synced"
        named.append(target)
        synced.clear()
        return real(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", rename)
    write(folder.directory, "one")
    assert named == [folder.directory / "one"]
    assert list(synced) == [folder.directory.stat().st_ino], "the name is synced, too"


def described(name: str, hours_ago: float) -> Manifest:
    return Manifest(name, 1e9 - hours_ago * 3600, {}, {}, {}, {}, {})


def test_the_newest_and_one_an_hour_a_day_a_week_are_kept() -> None:
    ages = [n / 6 for n in range(6 * 24 * 40)]  # one every ten minutes, for forty days
    manifests = [described(f"{age:.3f}", age) for age in ages]
    kept = {m.name for m in manifests} - set(Retention(3, 24, 7, 4).superfluous(manifests))
    assert {"0.000", "0.167", "0.333"} <= kept
    assert 30 <= len(kept) <= 3 + 24 + 7 + 4  # some are kept for two reasons
    assert max(map(float, kept)) > 14 * 24


def test_the_newest_is_never_superfluous() -> None:
    manifests = [described("a", 50), described("b", 40)]
    assert Retention(0, 0, 0, 0).superfluous(manifests) == ["a"]
    assert Retention(0, 0, 0, 0).superfluous([]) == []


def test_a_clock_that_was_set_back_does_not_make_the_newest_old(folder: CheckpointFolder) -> None:
    for number, created in enumerate((1_000.0, 2_000.0, 9e9, 1_500.0, 1_600.0), start=1):
        write(folder.directory, f"n{number}", created, number)
    assert folder.names() == ["n1", "n2", "n3", "n4", "n5"]
    assert folder.last_number() == 5
    newest = folder.newest_whole()
    assert newest is not None
    assert newest.name == "n5"
    assert "n5" not in Retention(1, 0, 0, 0).superfluous(list(folder.manifests()))
    assert folder.newest_whole(after=5) is None


def test_a_run_that_was_taken_back_goes_on_from_what_came_after_and_from_nothing_before(
    folder: CheckpointFolder,
) -> None:
    for number, name in enumerate(("good", "diverged", "worse"), start=1):
        write(folder.directory, name, float(number), number)
    found, taken_back = find(folder, "good", None)
    assert found is not None
    assert found.manifest.name == "good"
    assert taken_back == "good"
    for wish in ("good", "latest"):  # killed before anything was saved
        again, now = find(folder, wish, taken_back, 3)
        assert again is not None
        assert (again.manifest.name, now) == ("good", None)
    write(folder.directory, "after", 0.5, 4)
    for wish in ("good", "latest"):
        again, now = find(folder, wish, taken_back, 3)
        assert again is not None
        assert (again.manifest.name, now) == ("after", None)


def test_what_a_run_was_taken_back_to_may_be_gone(folder: CheckpointFolder) -> None:
    write(folder.directory, "other", 1.0, 1)
    gone = str(folder.directory / "gone")
    found, _ = find(folder, "latest", gone, 1)
    assert found is not None
    assert found.manifest.name == "other"
    with pytest.raises(ConfigurationError, match="has no checkpoint of this name"):
        find(folder, "gone", None, 1)


def test_what_a_rule_keeps_it_keeps_again() -> None:
    rule, kept = Retention(2, 3, 2, 1), list[Manifest]()
    for n in range(2_000):
        kept.append(described(str(n), 1_000 - n / 2))
        gone = rule.superfluous(kept)
        kept = [manifest for manifest in kept if manifest.name not in gone]
        assert len(kept) <= 2 + 3 + 2 + 1
    assert rule.superfluous(kept) == []


def test_a_run_whose_folder_was_moved_is_not_taken_back_again(folder: CheckpointFolder, tmp_path: Path) -> None:
    write(folder.directory, "good", 1.0, 1)
    _, taken_back = find(folder, "good", None)
    write(folder.directory, "after", 2.0, 2)
    moved = CheckpointFolder(folder.directory.rename(tmp_path / "moved"))
    for wish in ("good", str(moved.directory / "good"), "latest"):
        found, now = find(moved, wish, taken_back, 1)
        assert found is not None
        assert (found.manifest.name, now) == ("after", None)


def test_what_a_run_was_taken_back_to_may_be_removed_once_there_are_later_ones(folder: CheckpointFolder) -> None:
    write(folder.directory, "after", 2.0, 2)
    found, now = find(folder, "good", "good", 1)
    assert found is not None
    assert (found.manifest.name, now) == ("after", None)


def test_a_checkpoint_of_elsewhere_is_remembered_by_its_whole_path(folder: CheckpointFolder, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "good", 1.0, 1)
    _, place = find(folder, str(tmp_path / "elsewhere" / "good"), None)
    assert place == str((tmp_path / "elsewhere" / "good").resolve())
    found, now = find(folder, "latest", place, 0)
    assert found is not None
    assert (found.manifest.name, now) == ("good", None)
