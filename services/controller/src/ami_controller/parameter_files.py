"""The newest snapshot of each model on disk, so that the system does not lose what it has learned at a restart.

<run_dir>/parameters/<model>.snapshot    the snapshot's frames, as they are sent
<run_dir>/parameters/models.json         the models to which the parameters belong

file    magic · number of frames uint32 · length of each uint64 · the frames        all little endian
"""

from __future__ import annotations

import contextlib
import json
import logging
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ami_controller.answers import NAME
from ami_controller.restoring import MODELS, described_models, differing_models, differing_values, without_models
from ami_shared import limits, wire
from ami_shared.errors import ConfigurationError, WireError
from ami_shared.files import rename, sync_folder, write_whole
from ami_shared.snapshots import Snapshot

log = logging.getLogger(__name__)

MAGIC = b"AMI snapshot 1\n"
FINAL, DRAFT = ".snapshot", ".draft"
MODELS_FILE = "models.json"
INTERVAL_S = 30.0
MOST_OF_THE_TIME = 0.05  # share of the time that writing may take


class ParameterFiles:
    """A folder with one file for each model."""

    def __init__(self, folder: Path, agreement: Mapping[str, Any], partial: bool = False) -> None:
        """Open the folder and check that its parameters fit.

        Args:
            folder: of the files.
            agreement: see config.agreement(); the parameters must fit its models.
            partial: whether models whose configuration has changed may start afresh.

        Raises:
            ConfigurationError: the parameters belong to other models, or the folder cannot be read.
        """
        self._folder = folder
        self._models = {key: value for key, value in agreement.items() if key.startswith(MODELS)}
        self._partial, self._others = partial, set[str]()
        self._known: dict[str, Any] = {}
        self._check_models()

    def _check_models(self) -> None:
        path = self._folder / MODELS_FILE
        try:
            theirs = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} cannot be read ({error}): {self._way_out()}") from None
        ours = json.loads(json.dumps(self._models))
        if not isinstance(theirs, dict):
            raise ConfigurationError(f"{path} is not what AMI writes: {self._way_out()}")
        self._known = theirs
        if self._partial:
            self._others = differing_models(theirs, ours)
        elif differing := sorted(differing_values(theirs, ours)):
            told = [f"{key}: {theirs.get(key, 'absent')} there, {ours.get(key, 'absent')} here" for key in differing]
            raise ConfigurationError(
                f"{self._folder} has the parameters of other models ({'; '.join(told[:3])}): {self._way_out()}"
            )

    def _way_out(self) -> str:
        return f"choose another run_dir, or move {self._folder} away to start afresh"

    def load(self) -> list[Snapshot]:
        """Return the intact snapshots; damaged files are logged and set aside.

        Raises:
            ConfigurationError: a file may not be read, or cannot be set aside.
        """
        found = []
        self._remove_drafts()
        for path in sorted(self._folder.glob(f"*{FINAL}")):
            if path.stem in self._others:
                log.warning("%s belongs to another model of this name: %s starts afresh", path, path.stem)
                continue
            try:
                snapshot = _read(path)
                found.append(snapshot)
                log.info("%s: continuing from version %d", path.name, snapshot.version)
            except PermissionError as error:
                raise ConfigurationError(
                    f"{path}: {error.strerror}: a run's parameters must be readable by the user who resumes the run"
                ) from None
            except (OSError, WireError) as error:
                self._set_aside(path, error)
        return found

    @staticmethod
    def _set_aside(path: Path, why: Exception) -> None:
        aside = path.with_suffix(".broken")
        log.error("%s is broken (%s): set aside as %s", path, why, aside.name)
        try:
            rename(path, aside)
        except OSError as error:
            raise ConfigurationError(f"{path} is broken, and cannot be set aside: {error.strerror}") from None

    def write_all(self, snapshots: Sequence[Snapshot]) -> None:
        """Write the snapshots to which a run is taken back.

        Raises:
            ConfigurationError: they cannot be written.
        """
        try:
            drafts = [self._write(snapshot, DRAFT) for snapshot in snapshots]
            for draft in drafts:  # only when all are written: a mixture belongs to no moment of the run
                rename(draft, draft.with_suffix(FINAL))
            if drafts:
                sync_folder(self._folder)
        except OSError as error:
            self._remove_drafts()
            raise ConfigurationError(f"{error.filename or self._folder}: {error.strerror}: make room first") from None

    def _remove_drafts(self) -> None:
        for draft in self._folder.glob(f"*{DRAFT}"):
            with contextlib.suppress(OSError):
                draft.unlink()

    def write(self, snapshot: Snapshot) -> None:
        """Write a snapshot atomically: after a crash or power cut there is the old file or the new one.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        self._write(snapshot, FINAL)

    def _write(self, snapshot: Snapshot, suffix: str) -> Path:
        """Write a snapshot to a file that ends so; return its path. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        frames = wire.encode(snapshot.to_message(NAME, NAME))
        for other in self._others:  # of another model of this name: must not be found under it any more
            with contextlib.suppress(FileNotFoundError):
                stale = self._folder / f"{other}{FINAL}"
                rename(stale, stale.with_suffix(".other"))
        self._others = set()
        kept = without_models(self._known, described_models(self._models))  # their parameters may be there still
        if (models := {**self._models, **kept}) != self._known or not (self._folder / MODELS_FILE).exists():
            write_whole(self._folder / MODELS_FILE, [json.dumps(models).encode()])
            self._known = models
        head = struct.pack(f"<I{len(frames)}Q", len(frames), *map(len, frames))
        path = self._folder / f"{snapshot.model}{suffix}"
        write_whole(path, [MAGIC, head, *frames])
        return path


def _read(path: Path) -> Snapshot:
    content = memoryview(path.read_bytes())
    if content[: len(MAGIC)] != MAGIC:
        raise WireError("it is not a snapshot of this format")
    try:
        (count,) = struct.unpack_from("<I", content, len(MAGIC))
        if count > 2 + limits.MAX_ARRAYS:
            raise WireError(f"{count} frames")
        lengths = struct.unpack_from(f"<{count}Q", content, len(MAGIC) + 4)
    except struct.error:
        raise WireError("it is cut short") from None
    at, frames = len(MAGIC) + 4 + 8 * count, []
    for length in lengths:
        frames.append(content[at : at + length])
        at += length
    if at != len(content):
        raise WireError(f"{len(content)} bytes, expected {at}")
    snapshot = Snapshot.from_message(wire.decode(frames))
    if f"{snapshot.model}.snapshot" != path.name:
        raise WireError(f"it is a snapshot of {snapshot.model}")
    return snapshot


class ParameterKeeper(threading.Thread):
    """Writes the snapshots that are newer than the files: at intervals, and at the end."""

    def __init__(
        self,
        files: ParameterFiles,
        newer_than: Callable[[Mapping[str, int]], Sequence[Snapshot]],
        written: Mapping[str, int],
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Prepare the thread; it works once started.

        Args:
            files: where to write.
            newer_than: returns the snapshots that are newer than the given versions.
            written: model → version in the files.
            interval_s: least seconds between two rounds; more if writing is slow.
        """
        super().__init__(name="parameter keeper", daemon=True)
        self._files, self._newer_than, self._interval_s = files, newer_than, interval_s
        self._written = dict(written)
        self._ending = threading.Event()
        self.trouble: str | None = None

    def run(self) -> None:
        took_s = 0.0
        while not self._ending.wait(max(self._interval_s, took_s / MOST_OF_THE_TIME)):
            begin = time.monotonic()
            self._write_newer()
            took_s = time.monotonic() - begin

    def close(self) -> None:
        """End the thread, and write what is newer than the files."""
        self._ending.set()
        self.join()
        self._write_newer()

    def _write_newer(self) -> None:
        for snapshot in self._newer_than(self._written):
            try:
                self._files.write(snapshot)
            except WireError as error:
                log.error("version %d of %s is not saved: %s", snapshot.version, snapshot.model, error)
            except OSError as error:
                self.trouble = f"parameters cannot be written to {error.filename or 'run_dir'}: {error.strerror}"
                log.error("%s; a restart would fall back to older ones: make room, or repair the folder", self.trouble)
                return
            self._written[snapshot.model] = snapshot.version
        self.trouble = None
