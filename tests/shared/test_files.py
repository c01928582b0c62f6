"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from ami_shared import files
from ami_shared.errors import ConfigurationError
from ami_shared.files import lock_folder, rename, write_whole


def ends_with_the_disk() -> Iterator[bytes]:
    yield b"the first part"
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("number", "tolerated"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_syncs_no_folders_is_written_to(
    number: int, tolerated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(descriptor: int) -> None:
        raise OSError(number, "cannot")

    monkeypatch.setattr(files.os, "fsync", sync)
    with nullcontext() if tolerated else pytest.raises(OSError, match="cannot"):
        files.sync_folder(tmp_path)


def test_what_does_not_fit_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_whole(path, [b"old"])
    with pytest.raises(OSError, match="No space"):
        write_whole(path, ends_with_the_disk())
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(f"{tmp_path / 'missing'} cannot be written to")):
        lock_folder(tmp_path / "missing", "controller")


def test_a_folder_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(files, "_lock", lambda file: None)
    monkeypatch.setattr(Path, "open", lambda path, mode: Full())
    with pytest.raises(ConfigurationError, match=re.escape(f"{tmp_path} cannot be written to: No space left")):
        lock_folder(tmp_path, "controller")


@pytest.mark.parametrize(("winerror", "tries"), [(5, 3), (32, 3), (112, 1), (None, 1)])
def test_a_rename_is_tried_again_while_another_program_looks_at_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winerror: int | None, tries: int
) -> None:
    """As a virus scanner of Windows does; 112: the disk is full."""
    made: list[Path] = []
    replace = Path.replace

    def reluctantly(source: Path, target: Path) -> Path:
        made.append(source)
        if len(made) < 3:
            error = PermissionError(13, "in use")
            error.winerror = winerror  # type: ignore[attr-defined]
            raise error
        return replace(source, target)

    (tmp_path / "a").write_text("it")
    monkeypatch.setattr(Path, "replace", reluctantly)
    if tries == 3:
        rename(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "it"
    else:
        with pytest.raises(PermissionError):
            rename(tmp_path / "a", tmp_path / "b")
    assert len(made) == tries


def test_a_rename_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(source: Path, target: Path) -> Path:
        error = PermissionError(13, "in use")
        error.winerror = 32  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(Path, "replace", never)
    with pytest.raises(PermissionError):
        rename(tmp_path / "a", tmp_path / "b", patience_s=0.1)
