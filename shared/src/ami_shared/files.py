"""Files that are complete or absent, whatever fails while they are written."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from ami_shared.errors import ConfigurationError

BUSY, BUSY_FOR_S = (5, 32), 1.0  # access denied, sharing violation: Windows' errors for a file that is in use
NOT_FOR_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # answers of file systems of networks and virtual machines
LOCKED_BYTE = 1 << 20  # far beyond the text: on Windows a locked byte cannot be read


def write_whole(path: Path, parts: Iterable[bytes | memoryview], sync: bool = True, ending: str = "tmp") -> None:
    """Write a file under a temporary name and rename it: after a crash there is the old file or the new one.

    Args:
        path: the file.
        parts: its content.
        sync: make that hold through a power cut too; waits for the disk.
        ending: of the temporary name; must differ between processes that may write the file at the same time.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f"{path.name}.{ending}")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # an incomplete file must not fill the disk
        raise
    if sync:
        sync_folder(path.parent)


def rename(source: Path, target: Path, patience_s: float = BUSY_FOR_S) -> None:
    """Rename a file or folder, replacing the target.

    Args:
        source: the file or folder.
        target: its new place.
        patience_s: how long to retry while another program has it open, as virus scanners on Windows do with new files.

    Raises:
        OSError: it cannot be renamed.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            source.replace(target)
            return
        except OSError as error:
            if getattr(error, "winerror", None) not in BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def lock_folder(folder: Path, what: str) -> IO[bytes]:
    """Keep every other process out of a folder for as long as the returned file is open.

    Args:
        folder: an existing folder.
        what: the user of the folder, for the error message.

    Raises:
        ConfigurationError: another process uses it, or it cannot be written to.
    """
    try:
        file = (folder / ".lock").open("a+b")
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written to: {error.strerror}") from None
    try:
        _lock(file)
    except OSError:
        file.seek(0)
        holder = file.read(20).decode("ascii", "replace").strip()
        file.close()
        who = f"another {what} (process {holder or 'unknown'})"
        raise ConfigurationError(f"{folder} is used by {who}: end that one, or choose another run_dir") from None
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            file.close()
        raise ConfigurationError(f"{folder} cannot be written to: {error.strerror}") from None
    return file


def _lock(file: IO[bytes]) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can do that for folders."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(opened)
