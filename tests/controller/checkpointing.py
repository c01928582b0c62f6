"""Checkpointing without threads: for tests that say who speaks when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ami_controller.checkpoint_files import CheckpointFolder, Found
from ami_controller.checkpoint_writer import CheckpointWriter, Job
from ami_controller.checkpointing import Checkpointing, Schedule
from ami_controller.registry import Registry
from ami_controller.retention import Retention
from ami_controller.state import RunState
from ami_shared.snapshots import Snapshot


class WritesAtOnce(CheckpointWriter):
    """Does each job when it is given, in the caller's thread."""

    def put(self, job: Job) -> None:
        self.work(job)


class Ignored:
    """A learning record that nobody reads."""

    def put_points(self, service: str, points: Any) -> None: ...


def checkpointing(
    directory: Path,
    registry: Registry,
    expected: tuple[str, ...] = (),
    interval_s: float | None = None,
    found: Found | None = None,
    retention: Retention | None = None,
    run: RunState | None = None,
    models_of: Mapping[str, list[str] | None] | None = None,
    models: Sequence[Snapshot] = (),
) -> Checkpointing:
    """Return the controller's side of checkpoints, over a real folder."""
    folder = CheckpointFolder(directory)
    writer = WritesAtOnce(folder, retention or Retention(), lambda: None)
    schedule = Schedule(interval_s, first_after_s=60.0, timeout_s=30.0)
    of_models = (models_of or {}, lambda: models)
    about = (registry, expected, *of_models, run or RunState(), "name: test\n", Ignored(), found, 100.0)
    return Checkpointing(folder, writer, schedule, *about)
