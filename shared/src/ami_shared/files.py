"""Files that are there whole or not at all, whatever dies while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, parts: Iterable[bytes | memoryview], sync: bool = True) -> None:
    """Write a file under a temporary name and rename it: after a crash there is the old file or the new one.

    Args:
        sync: hold that for a power cut, too; waits for the disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        for part in parts:
            file.write(part)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a power cut; where folders cannot be opened (Windows) there is no need to."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
