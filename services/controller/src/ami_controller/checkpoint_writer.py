"""The thread that writes checkpoints, so that the controller's own thread never waits for the disk."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ami_controller.checkpoint_files import CheckpointFolder, Draft, Manifest
from ami_controller.retention import Retention
from ami_shared import limits
from ami_shared.snapshots import Snapshot
from ami_shared.state import to_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begin:
    """Begin a checkpoint of about `nbytes`; `texts` and `models` are files whose content is known.

    If it does not fit on the disk, superfluous checkpoints are removed first, except those in `keep`.
    """

    cut_id: str
    name: str
    nbytes: int
    texts: Sequence[tuple[str, bytes]]
    models: Sequence[Snapshot]
    keep: Collection[str]


@dataclass(frozen=True)
class Write:
    """Append a piece to a file of the checkpoint being written."""

    cut_id: str
    service: str
    path: str
    content: bytes | memoryview
    last: bool


@dataclass(frozen=True)
class Commit:
    """Complete the checkpoint: the manifest is made once all digests are known. Those in `keep` stay, however old."""

    cut_id: str
    manifest: Callable[[Draft], Manifest]
    keep: Collection[str]


@dataclass(frozen=True)
class Abandon:
    """Abandon the checkpoint."""

    cut_id: str


@dataclass(frozen=True)
class Written:
    """What has been written: a piece of a service's file, or (service == "") the whole checkpoint."""

    cut_id: str
    service: str = ""
    path: str = ""
    nbytes: int = 0
    last: bool = False
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Failed:
    """Why a checkpoint could not be written; it has been abandoned."""

    cut_id: str
    reason: str


Job = Begin | Write | Commit | Abandon


class CheckpointWriter(threading.Thread):
    """Does the queued jobs one by one; take_results() returns what came of them."""

    def __init__(self, folder: CheckpointFolder, retention: Retention, on_result: Callable[[], None]) -> None:
        """Prepare the thread; it works once started.

        Args:
            folder: where checkpoints are written.
            retention: which older ones are kept.
            on_result: called in this thread when there is a result to take.
        """
        super().__init__(name="checkpoint writer", daemon=True)
        self._folder, self._retention, self._on_result = folder, retention, on_result
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._results: deque[Written | Failed] = deque()
        self._draft: Draft | None = None
        self._cut_id = ""

    def put(self, job: Job) -> None:
        """Queue a job; never blocks."""
        self._jobs.put(job)

    def take_results(self) -> list[Written | Failed]:
        """Return the results since the last call."""
        return [self._results.popleft() for _ in range(len(self._results))]

    def close(self) -> None:
        """Abandon the checkpoint being written, and end the thread."""
        self._jobs.put(None)
        self.join(timeout=limits.CLOSING)

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.work(job)
            self._on_result()
        self._give_up()

    def work(self, job: Job) -> None:
        """Do one job, and queue its result."""
        try:
            if result := self._do(job):
                self._results.append(result)
        except OSError as error:
            self._results.append(Failed(job.cut_id, f"{error.filename or self._folder.directory}: {error.strerror}"))
            self._give_up()

    def _do(self, job: Job) -> Written | None:
        if isinstance(job, Begin):
            self._give_up()
            self._find_space(job)
            self._draft, self._cut_id = Draft(self._folder.directory, job.name), job.cut_id
            for path, content in job.texts:
                self._draft.append(path, content)
                self._draft.finish(path)
            for snapshot in job.models:
                self._write_model(self._draft, snapshot)
            return None
        if self._draft is None or self._cut_id != job.cut_id:
            return None  # it has been abandoned
        if isinstance(job, Write):
            self._draft.append(job.path, job.content)
            if job.last:
                self._draft.finish(job.path)
            return Written(job.cut_id, job.service, job.path, len(job.content), job.last)
        if isinstance(job, Abandon):
            self._give_up()
            return None
        return self._commit(job, self._draft)

    def _write_model(self, draft: Draft, snapshot: Snapshot) -> None:
        for file in to_files(f"models/{snapshot.model}", snapshot.arrays):
            for offset in range(0, file.nbytes, limits.STATE_CHUNK):
                draft.append(file.path, file.read(offset, limits.STATE_CHUNK))
            draft.finish(file.path)

    def _find_space(self, job: Begin) -> None:
        try:
            self._folder.check_space(job.nbytes)
        except OSError:
            self._make_room(job.keep)
            self._folder.check_space(job.nbytes)

    def _commit(self, job: Commit, draft: Draft) -> Written:
        manifest = job.manifest(draft)
        draft.commit(manifest)
        self._draft = None
        self._make_room(job.keep)
        return Written(job.cut_id, manifest=manifest)

    def _make_room(self, keep: Collection[str]) -> None:
        for name in self._retention.superfluous(list(self._folder.manifests())):
            if name in keep:
                continue
            try:
                self._folder.remove(name)
            except OSError as error:
                log.error("checkpoint %s, which is no longer kept, cannot be removed: %s", name, error)
            else:
                log.info("checkpoint %s is no longer kept", name)

    def _give_up(self) -> None:
        if self._draft:
            self._draft.abandon()
            self._draft = None
