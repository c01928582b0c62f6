"""What the controller must remember across restarts: two small JSON files in the run's directory.

state.json      all of it, safe from a power cut
versions.json   the largest version of each model; changes every second, and is written without waiting for the disk
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ami_shared.errors import ConfigurationError
from ami_shared.files import write_whole

VERSIONS = "versions.json"
WITHOUT_IT = (
    "restore it from a copy, or move it away: the run then continues from its newest checkpoint and parameters, "
    "without its pause, its MLflow run, and what it was taken back to"
)


@dataclass
class RunState:
    """The run's state.

    Attributes:
        paused: whether the system is paused; only resume ends a pause.
        epoch: of the lifecycle, see ami_shared.gate.
        versions: model → the largest version ever seen; versions never decrease.
        mlflow_run: the one MLflow run of this system.
        restored_from: the checkpoint that this run started from, or was taken back to: name in its folder, or path.
        restored_behind: number of the last checkpoint at that time: only later ones are successors of it.
        last_checkpoint: number of the last checkpoint made by this run, wherever its folder is now.
        lineage: changes when the run is taken back; services of the former lineage are not part of the run.
    """

    paused: bool = False
    epoch: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    mlflow_run: str | None = None
    restored_from: str | None = None
    restored_behind: int = -1
    last_checkpoint: int = 0
    lineage: str = field(default_factory=lambda: secrets.token_hex(8))

    def for_another_run(self) -> RunState:
        """Return the state for a run that begins with a checkpoint of this one.

        This one may be using its MLflow run at that moment, and its checkpoints are not those of the other.
        """
        return replace(self, versions=dict(self.versions), mlflow_run=None, last_checkpoint=0)

    def to_fields(self) -> dict[str, Any]:
        """Return what run_state_of() reads back; thread-safe, even while a model is added."""
        return {**vars(self), "versions": dict(self.versions)}


def load_state(run_dir: Path) -> RunState:
    """Read the state, or return a fresh one if there is none.

    Raises:
        ConfigurationError: the file exists, but is not what save_state() writes.
    """
    path = run_dir / "state.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        return RunState()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): {WITHOUT_IT}") from None
    if not _fits(fields):
        raise ConfigurationError(f"{path} is not a run's state: {WITHOUT_IT}")
    state = RunState(**fields)
    for model, version in _read_versions(run_dir / VERSIONS).items():
        state.versions[model] = max(version, state.versions.get(model, 0))
    return state


def _read_versions(path: Path) -> dict[str, int]:
    """Return what save_versions() wrote; empty if a power cut has damaged it."""
    try:
        versions = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    fits = isinstance(versions, dict) and all(type(version) is int for version in versions.values())
    return versions if fits else {}


def run_state_of(fields: Mapping[str, Any]) -> RunState:
    """Return the state from a checkpoint; a fresh one if it is incomplete."""
    return RunState(**fields) if _fits(fields) else RunState()


def _fits(fields: Any) -> bool:
    match fields:
        case {"paused": bool(), "epoch": int(), "versions": dict(versions), "mlflow_run": str() | None}:
            later = (fields.get(key, 0) for key in ("restored_behind", "last_checkpoint"))
            numbers = (fields["epoch"], *later, *versions.values())
            restored_from, lineage = fields.get("restored_from"), fields.get("lineage", "")
            return (
                fields.keys() <= RunState.__dataclass_fields__.keys()
                and all(type(number) is int for number in numbers)
                and isinstance(restored_from, str | None)
                and isinstance(lineage, str)
            )
    return False


def save_state(run_dir: Path, state: RunState) -> None:
    """Write the state atomically, and wait for the disk: even a power cut leaves the old file or the new one."""
    write_whole(run_dir / "state.json", [json.dumps(state.to_fields()).encode()])


def save_versions(run_dir: Path, state: RunState) -> None:
    """Write only the versions, atomically, without waiting for the disk: a power cut may lose them, or the file."""
    write_whole(run_dir / VERSIONS, [json.dumps(dict(state.versions)).encode()], sync=False)
