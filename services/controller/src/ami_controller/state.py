"""What the controller must remember across its own death: one small JSON file in the run's directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ami_shared.errors import ConfigurationError
from ami_shared.files import write_whole


@dataclass
class RunState:
    """The run's memory.

    Attributes:
        paused, epoch: the lifecycle; a pause holds through anything but resume.
        versions: the largest version of each model ever seen; versions never go back.
        mlflow_run: the one MLflow run of this system.
        restored_from: the checkpoint that this run was begun from, or taken back to; once.
        restored_behind: number of the last checkpoint that there was then: only later ones come after it.
    """

    paused: bool = False
    epoch: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    mlflow_run: str | None = None
    restored_from: str | None = None
    restored_behind: int = -1

    def to_fields(self) -> dict[str, Any]:
        """Return what run_state_of() reads back; from any thread, while another adds a model."""
        return {**vars(self), "versions": dict(self.versions)}


def load_state(run_dir: Path) -> RunState:
    """Read the state, or return a fresh one.

    Raises:
        ConfigurationError: the file is there, but is not what save_state() writes.
    """
    path = run_dir / "state.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        return RunState()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): move it away to begin a new run") from None
    if not _fits(fields):
        raise ConfigurationError(f"{path} is not a run's state: move it away to begin a new run")
    return RunState(**fields)


def run_state_of(fields: Mapping[str, Any]) -> RunState:
    """Return the state that a checkpoint kept; a fresh one where it is not whole."""
    return RunState(**fields) if _fits(fields) else RunState()


def _fits(fields: Any) -> bool:
    match fields:
        case {"paused": bool(), "epoch": int(), "versions": dict(versions), "mlflow_run": str() | None}:
            numbers = (fields["epoch"], fields.get("restored_behind", -1), *versions.values())
            known = {"paused", "epoch", "versions", "mlflow_run", "restored_from", "restored_behind"}
            restored_from = fields.get("restored_from")
            return (
                fields.keys() <= known
                and all(type(number) is int for number in numbers)
                and isinstance(restored_from, str | None)
            )
    return False


def save_state(run_dir: Path, state: RunState, sync: bool = True) -> None:
    """Write the state whole: after a crash there is the old file or the new one; after a power cut only with `sync`."""
    write_whole(run_dir / "state.json", [json.dumps(state.to_fields()).encode()], sync)
