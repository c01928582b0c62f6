"""A service's own health, readable by other processes of the machine (a container's health check) without a socket.

Each service writes a small file at every heartbeat. It is healthy if the file is fresh and its loop makes progress.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

from ami_shared.files import write_whole

log = logging.getLogger(__name__)

FRESH_S = 5.0
LOOP_STUCK_S = 30.0


def health_path(hub_port: int, role: str, name: str) -> Path:
    """Return where a service of this name, of the system at this hub port, writes its health on this machine."""
    try:
        folder = tempfile.gettempdir()
    except OSError:  # none can be written to: the file then tells why, and the service runs
        folder = os.environ.get("TMPDIR", "/tmp")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(folder) / f"ami-{user}" / f"{hub_port}-{role}-{name}.json"


class HealthFile:
    """The file that a service writes; a service that cannot write it says so once, and continues."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trouble = ""

    def write(self, state: str, loop_age_s: float, linked: bool) -> None:
        """Replace the file atomically: a reader sees the old one or the new one."""
        report = {
            "pid": os.getpid(),
            "time": time.time(),
            "state": state,
            "loop_age_s": loop_age_s,
            "linked": linked,
        }
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(self._path.parent)
            write_whole(self._path, [json.dumps(report).encode()], sync=False, ending=f"{os.getpid()}.tmp")
        except OSError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("--health cannot report this service: %s", error)
        else:
            self._trouble = ""

    def remove(self) -> None:
        """Remove the file at the service's end, unless another process of the same name has replaced it."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(self._path.read_text())["pid"] == os.getpid():
                self._path.unlink(missing_ok=True)


def _check_own(folder: Path) -> None:
    """Raise PermissionError if other users could write to the folder, whose name is predictable."""
    if not hasattr(os, "getuid"):
        return
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by others: remove it, or set TMPDIR to another place")


def read_health(path: Path) -> tuple[bool, str]:
    """Return whether the service is healthy, and one line that says why or why not."""
    try:
        _check_own(path.parent)
        report: dict[str, Any] = json.loads(path.read_text())
        age_s = time.time() - float(report["time"])
        stuck_s = float(report["loop_age_s"])
        line = f"{report['state']}, pid {report['pid']}, hub {'linked' if report['linked'] else 'not linked'}"
    except PermissionError as error:
        return False, str(error)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return False, f"no health report at {path} ({type(error).__name__}): the service is not running"
    if age_s < -FRESH_S:
        return False, f"{line}; its last report is dated in the future: the clock was set back"
    if age_s > FRESH_S:
        return False, f"{line}; last report {age_s:.0f} s ago: the process is gone or stopped"
    if stuck_s > LOOP_STUCK_S:
        return False, f"{line}; its loop has not moved for {stuck_s:.0f} s"
    return True, line
