"""Files that are there whole or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ami_shared import files
from ami_shared.errors import ConfigurationError
from ami_shared.files import lock_folder, write_whole


def ends_with_the_disk() -> Iterator[bytes]:
    yield b"the first part"
    raise OSError(28, "No space left on device")


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
