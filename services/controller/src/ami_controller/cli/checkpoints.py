"""`ami checkpoints`: lists, verifies, shows and removes the checkpoints of a run, on the machine that has them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table

from ami_controller.checkpoint_files import CheckpointError, CheckpointFolder, Manifest
from ami_controller.cli.render import duration
from ami_shared.config import load_config
from ami_shared.errors import ConfigurationError


def folder_of(directory: str | None, overrides: Sequence[str]) -> CheckpointFolder:
    """Return the named folder, which must exist, or that of the experiment.

    Raises:
        ConfigurationError: the named folder does not exist, or may not be read.
    """
    if directory is not None and not Path(directory).is_dir():
        raise ConfigurationError(f"--dir {directory} is not a folder")
    folder = CheckpointFolder(Path(directory or load_config(overrides).checkpoint.directory))
    folder.check_readable()
    return folder


def show_list(folder: CheckpointFolder, console: Console) -> int:
    """Print one line per checkpoint; return 1 if one is damaged."""
    console.print(table_of(folder, time.time()))
    broken = broken_ones(folder)
    for line in broken:
        console.print(f"! {line}", style="bold red", soft_wrap=True)
    return 1 if broken else 0


def table_of(folder: CheckpointFolder, now: float) -> RenderableType:
    """Return all readable checkpoints as a table, oldest first."""
    manifests = [folder.manifest(name) for name in folder.names()]
    if not manifests:
        return f"no checkpoint in {folder.directory}"
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(("checkpoint", "age", "size", "steps", "gradient steps", "versions")):
        table.add_column(column, justify="left" if i in (0, 5) else "right", no_wrap=i != 5)
    for manifest in manifests:
        table.add_row(
            f"{manifest.name}, kept" if manifest.about.get("named") else manifest.name,
            duration(max(0.0, now - manifest.created)),
            f"{manifest.nbytes / 1e6:,.1f} MB",
            _numbers(manifest, "steps"),
            _numbers(manifest, "updates"),
            "  ".join(f"{model} v{version}" for model, version in manifest.about.get("versions", {}).items()),
        )
    return table


def _numbers(manifest: Manifest, about: str) -> str:
    return "  ".join(f"{name} {count:,}" for name, count in manifest.about.get(about, {}).items() if count is not None)


def broken_ones(folder: CheckpointFolder) -> list[str]:
    """Return a line for each folder that has no readable manifest."""
    lines = []
    for name in sorted(set(folder.all_names()) - set(folder.names())):
        try:
            folder.manifest(name)
        except CheckpointError as error:
            lines.append(str(error))
    return lines


def verify(folder: CheckpointFolder, names: Sequence[str], console: Console) -> int:
    """Verify every byte of the named checkpoints, or of all; return 1 if one is damaged."""
    broken = 0
    for name in names or folder.all_names():
        try:
            manifest = folder.verify(name)
            console.print(f"{name}: complete, {len(manifest.files)} files, {manifest.nbytes / 1e6:,.1f} MB")
        except CheckpointError as error:
            there = name in folder.all_names()
            if not names and not there:
                continue  # a running controller has removed it meanwhile
            broken += 1
            why = error if there else f"there is no checkpoint {name} in {folder.directory}"
            console.print(f"! {why}", style="bold red", soft_wrap=True)
    return 1 if broken else 0


def show(folder: CheckpointFolder, name: str) -> None:
    """Print a checkpoint's manifest as JSON."""
    manifest = folder.manifest(name)
    print(json.dumps({**asdict(manifest), "bytes": manifest.nbytes}, indent=2))


def remove(folder: CheckpointFolder, name: str) -> None:
    """Remove a checkpoint; never the only intact one.

    Raises:
        ConfigurationError: it does not exist, or no intact one would be left.
    """
    if name not in folder.all_names():
        raise ConfigurationError(f"there is no checkpoint {name} in {folder.directory}")
    others = [other for other in reversed(folder.names()) if other != name]
    if name in folder.names() and not any(_is_whole(folder, other) for other in others):
        raise ConfigurationError(f"{name} is the last intact checkpoint in {folder.directory}: it is not removed")
    folder.remove(name)
    print(f"{name} removed")


def _is_whole(folder: CheckpointFolder, name: str) -> bool:
    try:
        folder.verify(name)
    except CheckpointError:
        return False
    return True
