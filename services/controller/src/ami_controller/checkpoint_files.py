"""Checkpoints on the disk: one folder each, whole or not there, verified before anything of it is used.

<directory>/<name>/manifest.json    what it is of, and the size and sha256 of every other file
<directory>/<name>/config.yaml      the configuration as it was composed
<directory>/<name>/…                the services' files, see ami_shared.state
<directory>/.<name>.saving/         one that is being written; what an earlier life left of such is removed

Files are synced, then their folders, then the whole is renamed: what has its name is complete, whatever dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ami_shared.checkpoints import Described
from ami_shared.errors import AmiError, ConfigurationError, WireError
from ami_shared.files import rename, sync_folder, write_whole
from ami_shared.names import is_name

FORMAT = 1
MANIFEST = "manifest.json"
READ_BYTES = 1 << 20
SPARE_BYTES = 64 << 20  # of the disk, left free for everything else
STRAY = ("desktop.ini", "Thumbs.db")  # what file managers leave where somebody has looked, beside hidden files
_PLAIN = ("name", "created", "agreement", "services", "about", "run", "number")


class CheckpointError(AmiError):
    """A checkpoint is broken, of another format, or not there."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        created: seconds since the epoch, by a clock that may be set back.
        agreement: of the configuration that it was made under.
        services: name → role, and the paths of its files.
        files: path → size and digest, of all files but the manifest.
        about: what is worth showing: steps, versions, frontiers, gradient steps.
        run: the controller's own memory, see state.RunState.
        number: grows with every checkpoint of a folder, whatever the clock says.
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
        """Return [[path, bytes, sha256], …] of a service's own state; models come as snapshots."""
        paths = self.services.get(service, {}).get("files", [])
        kept = (self.files[path] for path in paths if not path.startswith("models/"))
        return [[file.path, file.nbytes, file.digest] for file in kept]

    def to_json(self) -> bytes:
        """Return the text that from_json() reads; its own digest is in it."""
        fields = {name: getattr(self, name) for name in _PLAIN}
        fields["files"] = [[file.path, file.nbytes, file.digest] for file in self.files.values()]
        fields["format"] = FORMAT
        fields["sha256"] = _digest_of(fields)
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Read it; raise CheckpointError where something is off."""
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
    """Return them in the order of their numbers; older ones than these have none, and go by the clock."""
    return sorted(manifests, key=lambda manifest: (manifest.number, manifest.created))[::-1]


def _digest_of(fields: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def is_safe(path: str) -> bool:
    """Whether a path that came over the wire names a file within the checkpoint, and nothing else."""
    return re.fullmatch(r"(?:\w[\w.-]{0,63}/){0,3}\w[\w.-]{0,79}", path, re.ASCII) is not None


class Draft:
    """A checkpoint that is being written."""

    def __init__(self, directory: Path, name: str) -> None:
        """Make its folder. Raises OSError, FileExistsError where there is one of this name."""
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
        """Return what a finished JSON file holds; nothing where it holds no map."""
        try:
            content = json.loads((self.folder / path).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def commit(self, manifest: Manifest) -> None:
        """Make it a checkpoint. Raises OSError."""
        write_whole(self.folder / MANIFEST, [manifest.to_json()])
        for folder, _, _ in os.walk(self.folder, topdown=False):
            sync_folder(Path(folder))
        rename(self.folder, self._directory / self.name)
        sync_folder(self._directory)

    def abandon(self) -> None:
        """Remove what has been written."""
        for file, _ in self._open.values():
            with contextlib.suppress(OSError):  # what it still holds does not fit on the disk
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class CheckpointFolder:
    """The directory of all checkpoints of a run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def clear_litter(self) -> None:
        """Remove what a save that died has left; only for whoever alone writes here."""
        for left in self.directory.glob(".*.saving"):
            shutil.rmtree(left, ignore_errors=True)
        for left in self.directory.glob(".*.removed"):
            shutil.rmtree(left, ignore_errors=True)

    def check_space(self, nbytes: int) -> None:
        """Raise OSError where so many bytes do not fit."""
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if free < nbytes + SPARE_BYTES:
            needed = f"{nbytes / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB free"
            raise OSError(28, f"no space for another checkpoint: {needed}", str(self.directory))

    def check_readable(self) -> None:
        """Raise ConfigurationError where this user may not read what is there: that is no reason to begin anew."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.listdir(self.directory)
            for name in self.all_names():
                try:
                    (self.directory / name / MANIFEST).open("rb").close()
                except PermissionError:
                    raise
                except OSError:  # of the disk, or there is none: that folder is passed over
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
        """Return what the readable ones say of themselves."""
        return newest_first(self.manifests())

    def last_number(self) -> int:
        """Return the largest number that a checkpoint has; 0 where there is none."""
        return max((manifest.number for manifest in self.manifests()), default=0)

    def manifests(self) -> Iterator[Manifest]:
        """Return what the readable ones say of themselves, in no order."""
        for name in self.all_names():
            try:
                yield self.manifest(name)
            except CheckpointError:
                continue

    def all_names(self) -> list[str]:
        """Return the names of all folders that could be checkpoints, broken ones too."""
        try:
            return sorted(entry.name for entry in self.directory.iterdir() if entry.is_dir() and is_name(entry.name))
        except OSError:  # not there, or not readable: whoever writes says so
            return []

    def manifest(self, name: str) -> Manifest:
        """Return what a checkpoint says of itself; raise CheckpointError where that cannot be read."""
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
            CheckpointError: names the first file that is missing, extra, or not what the manifest says.
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
                raise CheckpointError(f"{path}: {size:,} bytes, it was saved with {file.nbytes:,}")
            if digest != file.digest:
                raise CheckpointError(f"{path}: its content is not what was saved")
        return manifest

    def newest_whole(self, complain: Any = lambda error: None, after: int = -1) -> Manifest | None:
        """Return the newest checkpoint that verifies; `complain` is told of each that does not.

        Args:
            after: number that it must be beyond.
        """
        for manifest in self.newest_first():
            if manifest.number <= after:
                return None
            try:
                return self.verify(manifest.name)
            except CheckpointError as error:
                complain(error)
        for name in set(self.all_names()) - set(self.names()):
            try:
                self.manifest(name)
            except CheckpointError as error:
                complain(error)
        return None

    def newest_complete(self, but: Container[str]) -> Iterator[Manifest]:
        """Return the checkpoints whose files have their sizes, the newest first; not a byte of them is read."""
        for manifest in self.newest_first():
            folder = self.directory / manifest.name
            with contextlib.suppress(OSError):  # a file is not there
                if manifest.name not in but and all(
                    (folder / file.path).stat().st_size == file.nbytes for file in manifest.files.values()
                ):
                    yield manifest

    def read(self, name: str, path: str, offset: int, size: int) -> bytes:
        """Return a piece of a file. Raises OSError."""
        with (self.directory / name / path).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def read_whole(self, name: str, path: str) -> bytes:
        """Return a file. Raises OSError."""
        return (self.directory / name / path).read_bytes()

    def remove(self, name: str) -> None:
        """Remove a checkpoint; one that dies in the middle of it never leaves half of one. Raises OSError."""
        doomed = self.directory / f".{name}.removed"
        rename(self.directory / name, doomed)
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
