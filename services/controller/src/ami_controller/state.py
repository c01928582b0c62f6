"""What the controller must remember across its own death: one small JSON file in the run's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
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
    """

    paused: bool = False
    epoch: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    mlflow_run: str | None = None


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


def _fits(fields: Any) -> bool:
    match fields:
        case {"paused": bool(), "epoch": int(), "versions": dict(versions), "mlflow_run": str() | None}:
            numbers = (fields["epoch"], *versions.values())
            return len(fields) == 4 and all(type(number) is int for number in numbers)
    return False


def save_state(run_dir: Path, state: RunState, sync: bool = True) -> None:
    """Write the state whole: after a crash there is the old file or the new one; after a power cut only with `sync`."""
    write_whole(run_dir / "state.json", [json.dumps(asdict(state)).encode()], sync)
