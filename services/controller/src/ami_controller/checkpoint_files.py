"""Checkpoints on disk: one folder each, complete or absent, verified before any part of it is used.

<directory>/<name>/manifest.json    what it contains, and the size and sha256 of every other file
<directory>/<name>/config.yaml      the configuration as it was composed
<directory>/<name>/…                the services' files, see ami_shared.state
<directory>/.<name>.saving/         one that is being written; leftovers of an earlier process are removed

Files are synced, then their folders, then the folder is renamed: a folder with its final name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ami_shared.checkpoints import Described
from ami_shared.errors import AmiError, ConfigurationError, WireError
from ami_shared.files import lock_folder, rename, sync_folder, write_whole
from ami_shared.names import is_name

FORMAT = 1
MANIFEST = "manifest.json"
READ_BYTES = 1 << 20
SCANNED_FOR_S = 60.0  # as long as virus scanners may hold one of a new folder's files open
SPARE_BYTES = 64 << 20  # disk space left free for everything else
STRAY = ("desktop.ini", "Thumbs.db")  # what file managers leave in folders, besides hidden files
_PLAIN = ("name", "created", "agreement", "services", "about", "run", "number")


class CheckpointError(AmiError):
    """A checkpoint is damaged, of another format, or missing."""


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        created: seconds since the epoch, by a clock that may be set back.
        agreement: see config.agreement(), of the configuration that it was made under.
        services: name → role, and the paths of its files.
        files: path → size and digest, of all files but the manifest.
        about: what is worth showing: steps, versions, frontiers, gradient steps.
        run: the controller's own state, see state.RunState.
        number: grows with every checkpoint of a folder, independently of the clock.
    """

    name: str
    created: float
    agreement: Mapping[str, Any]
    services: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Described]
    about: Mapping[str, Any]
    run: Mapping[str, Any]
    number: int = 0

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    def files_of(self, service: str) -> list[list[Any]]:
        """Return [[path, bytes, sha256], …] of a service's own state; models are delivered as snapshots."""
        paths = self.services.get(service, {}).get("files", [])
        kept = (self.files[path] for path in paths if not path.startswith("models/"))
        return [[file.path, file.nbytes, file.digest] for file in kept]

    def to_json(self) -> bytes:
        """Return the text that from_json() reads; it contains its own digest."""
        fields = {name: getattr(self, name) for name in _PLAIN}
        fields["files"] = [[file.path, file.nbytes, file.digest] for file in self.files.values()]
        fields["format"] = FORMAT
        fields["sha256"] = _digest_of(fields)
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Parse a manifest; raise CheckpointError if it is malformed or damaged."""
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise CheckpointError(f"format {fields['format']!r:.20}, this code reads {FORMAT}")
            if fields.pop("sha256") != _digest_of(fields):
                raise CheckpointError("its digest does not fit: it was changed, or is damaged")
            files = {file.path: file for file in Described.all_of(fields["files"])}
            services = {
                str(name): {"role": str(service["role"]), "files": list(service["files"])}
                for name, service in fields["services"].items()
            }
            named = [path for service in services.values() for path in service["files"]]
            if not all(path in files for path in named) or not all(is_safe(path) for path in files):
                raise CheckpointError("it names files that it does not describe")
            about = (fields["agreement"], services, files, fields["about"], fields["run"], int(fields.get("number", 0)))
            return cls(str(fields["name"]), float(fields["created"]), *about)
        except (ValueError, KeyError, TypeError, AttributeError, WireError) as error:
            raise CheckpointError(f"it cannot be read ({type(error).__name__}: {error})") from None


def newest_first(manifests: Iterable[Manifest]) -> list[Manifest]:
    """Return manifests newest first, by number; those of older formats have none, and are ordered by time."""
    return sorted(manifests, key=lambda manifest: (manifest.number, manifest.created))[::-1]


def _digest_of(fields: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def is_safe(path: str) -> bool:
    """Return whether a path received over the wire stays within the checkpoint."""
    return re.fullmatch(r"(?:\w[\w.-]{0,63}/){0,3}\w[\w.-]{0,79}", path, re.ASCII) is not None


class Draft:
    """A checkpoint that is being written."""

    def __init__(self, directory: Path, name: str) -> None:
        """Make the folder.

        Raises:
            FileExistsError: there is a checkpoint of this name already.
            OSError: the folder cannot be made.
        """
        self._directory, self.name = directory, name
        if (directory / name).exists():
            raise FileExistsError(17, "there is a checkpoint of this name already", str(directory / name))
        self.folder = directory / f".{name}.saving"
        self.folder.mkdir(parents=True)
        self.described: dict[str, Described] = {}
        self._open: dict[str, tuple[Any, Any]] = {}

    def append(self, path: str, content: bytes | memoryview) -> None:
        """Write the next piece of a file. Raises OSError."""
        if path not in self._open:
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._open[path] = (target.open("wb"), hashlib.sha256())
        file, digest = self._open[path]
        file.write(content)
        digest.update(content)

    def finish(self, path: str) -> None:
        """Sync a file whose last piece has been written. Raises OSError."""
        file, digest = self._open.pop(path)
        with file:
            file.flush()
            os.fsync(file.fileno())
            self.described[path] = Described(path, file.tell(), digest.hexdigest())

    def read_json(self, path: str) -> dict[str, Any]:
        """Return the map in a finished JSON file; empty if it contains something else."""
        try:
            content = json.loads((self.folder / path).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and turn the draft into a checkpoint. Raises OSError."""
        write_whole(self.folder / MANIFEST, [manifest.to_json()])
        for folder, _, _ in os.walk(self.folder, topdown=False):
            sync_folder(Path(folder))
        rename(self.folder, self._directory / self.name, SCANNED_FOR_S)
        sync_folder(self._directory)

    def abandon(self) -> None:
        """Remove what has been written."""
        for file, _ in self._open.values():
            with contextlib.suppress(OSError):  # the rest of its buffer does not fit on the disk
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class CheckpointFolder:
    """The directory of all checkpoints of a run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._disk: int | None = None

    def lock(self) -> IO[bytes]:
        """Keep every other controller out of the folder for as long as the returned file is open.

        Raises:
            ConfigurationError: another one uses it.
        """
        self._disk = self.directory.stat().st_dev
        return lock_folder(self.directory, "controller")

    def clear_litter(self) -> None:
        """Remove the leftovers of interrupted saves; only for the sole writer of the folder."""
        for left in self.directory.glob(".*.saving"):
            shutil.rmtree(left, ignore_errors=True)
        for left in self.directory.glob(".*.removed"):
            shutil.rmtree(left, ignore_errors=True)

    def check_space(self, nbytes: int) -> None:
        """Raise OSError if `nbytes` do not fit on the disk, or it is no longer the disk that it was at first."""
        there = next(folder for folder in (self.directory, *self.directory.absolute().parents) if folder.exists())
        if self._disk is not None and there.stat().st_dev != self._disk:
            raise OSError(
                2, "this is not on the disk on which the run began: is that one mounted?", str(self.directory)
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if free < nbytes + SPARE_BYTES:
            needed = f"{(nbytes + SPARE_BYTES) / 1e6:,.0f} MB must be free, {SPARE_BYTES / 1e6:,.0f} of them to spare"
            reason = f"no space for another checkpoint: {needed}; {free / 1e6:,.0f} MB are"
            raise OSError(28, reason, str(self.directory))

    def check_readable(self) -> None:
        """Raise ConfigurationError if this user may not read the checkpoints: the run must not start afresh then."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.listdir(self.directory)
            for name in self.all_names():
                try:
                    (self.directory / name / MANIFEST).open("rb").close()
                except PermissionError:
                    raise
                except OSError:  # a disk error, or no manifest: that folder is skipped
                    continue
        except PermissionError as error:
            raise ConfigurationError(
                f"{error.filename}: {error.strerror}: a run's checkpoints must be readable by the user who resumes "
                f"the run"
            ) from None

    def names(self) -> list[str]:
        """Return the names of all checkpoints, oldest first."""
        return [manifest.name for manifest in reversed(self.newest_first())]

    def newest_first(self) -> list[Manifest]:
        """Return the readable manifests, newest first."""
        return newest_first(self.manifests())

    def last_number(self) -> int:
        """Return the largest number of a checkpoint; 0 if there is none."""
        return max((manifest.number for manifest in self.manifests()), default=0)

    def manifests(self, complain: Callable[[CheckpointError], object] = lambda error: None) -> Iterator[Manifest]:
        """Yield the readable manifests, in no particular order; `complain` is called with the error of each other."""
        for name in self.all_names():
            try:
                yield self.manifest(name)
            except CheckpointError as error:
                complain(error)

    def all_names(self) -> list[str]:
        """Return the names of all folders that could be checkpoints, damaged ones included."""
        try:
            return sorted(entry.name for entry in self.directory.iterdir() if entry.is_dir() and is_name(entry.name))
        except OSError:  # missing or not readable: the writer reports that
            return []

    def manifest(self, name: str) -> Manifest:
        """Return a checkpoint's manifest; raise CheckpointError if it cannot be read."""
        path = self.directory / name / MANIFEST
        try:
            manifest = Manifest.from_json(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return replace(manifest, name=name)  # its folder may have been renamed

    def verify(self, name: str) -> Manifest:
        """Read every byte of a checkpoint.

        Raises:
            CheckpointError: names the first file that is missing, superfluous, or differs from the manifest.
        """
        manifest, folder = self.manifest(name), self.directory / name
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        if extra := sorted(path for path in there - manifest.files.keys() - {MANIFEST} if not _is_stray(path)):
            raise CheckpointError(f"{folder / extra[0]} is not part of the checkpoint: move it away")
        for file in manifest.files.values():
            path = folder / file.path
            try:
                size, digest = _size_and_digest(path)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror}") from None
            if size != file.nbytes:
                raise CheckpointError(f"{path}: {size:,} bytes, but {file.nbytes:,} were saved")
            if digest != file.digest:
                raise CheckpointError(f"{path}: its content differs from what was saved")
        return manifest

    def newest_whole(
        self, complain: Callable[[CheckpointError], object] = lambda error: None, after: int = -1
    ) -> Manifest | None:
        """Return the newest checkpoint that passes verification.

        Args:
            complain: called with the error of each checkpoint that fails.
            after: only checkpoints with larger numbers count.
        """
        for manifest in newest_first(self.manifests(complain)):
            if manifest.number <= after:
                return None
            try:
                return self.verify(manifest.name)
            except CheckpointError as error:
                complain(error)
        return None

    def newest_complete(self, but: Container[str]) -> Iterator[Manifest]:
        """Yield the checkpoints whose files have the right sizes, newest first, without reading the files."""
        for manifest in self.newest_first():
            folder = self.directory / manifest.name
            with contextlib.suppress(OSError):  # a file is missing
                if manifest.name not in but and all(
                    (folder / file.path).stat().st_size == file.nbytes for file in manifest.files.values()
                ):
                    yield manifest

    def read(self, name: str, path: str, offset: int, size: int) -> bytes:
        """Return `size` bytes of a file, from `offset`. Raises OSError."""
        with (self.directory / name / path).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def read_whole(self, name: str, path: str) -> bytes:
        """Return a file's content. Raises OSError."""
        return (self.directory / name / path).read_bytes()

    def remove(self, name: str) -> None:
        """Remove a checkpoint; an interruption never leaves half of one. Raises OSError."""
        doomed = self.directory / f".{name}.removed"
        rename(self.directory / name, doomed, SCANNED_FOR_S)
        sync_folder(self.directory)
        shutil.rmtree(doomed, ignore_errors=True)


@dataclass(frozen=True)
class Found:
    """A checkpoint that has been verified, and where it is."""

    folder: CheckpointFolder
    manifest: Manifest


def _is_stray(path: str) -> bool:
    return any(part.startswith(".") or part in STRAY for part in path.split("/"))


def _size_and_digest(path: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()
