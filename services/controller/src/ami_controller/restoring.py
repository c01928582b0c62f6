"""What a run continues from: which checkpoint, whether it fits, and its models as snapshots for replicas."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ami_controller.checkpoint_files import MANIFEST, CheckpointError, CheckpointFolder, Found
from ami_shared.errors import ConfigurationError, WireError
from ami_shared.snapshots import Snapshot
from ami_shared.state import from_files

log = logging.getLogger(__name__)

LATEST = "latest"
NOT_NAMES = (LATEST, "null")  # have a special meaning in checkpoint=…
MUST_FIT = ("models.", "observation.", "action.", "policy_input")


def find(
    folder: CheckpointFolder, wish: str | None, taken_back_to: str | None, behind: int = -1
) -> tuple[Found | None, str | None]:
    """Find and verify the requested checkpoint.

    Args:
        folder: of this run.
        wish: latest, a name in the folder, a path, or None.
        taken_back_to: the place to which this run has been taken back already; that is done once.
        behind: number of the last checkpoint at that time; the run was taken back from those up to it.

    Returns:
        The checkpoint to continue from, if any; and its place if the run is taken back to it now.

    Raises:
        ConfigurationError: the named checkpoint is damaged or missing, or this user may not read the checkpoints.
    """
    if wish is None:
        return None, None
    folder.check_readable()
    if wish != LATEST:
        own = folder.directory / wish
        path = own if own.is_dir() else Path(wish)
        if taken_back_to not in (place_of(folder, own), place_of(folder, path)):
            return _named(path), place_of(folder, path)
        log.info("this run was taken back to %s already: it continues from its later state", path)
    passed_over = partial(log.error, "a damaged checkpoint is skipped: %s")
    if manifest := folder.newest_whole(passed_over, behind if taken_back_to else -1):
        return Found(folder, manifest), None
    if taken_back_to:  # and nothing has been saved since
        try:
            return _named(folder.directory / taken_back_to), None
        except ConfigurationError as error:
            if wish != LATEST:
                raise
            log.error("%s; this run was taken back to it: the newest other one is used instead", error)
        if manifest := folder.newest_whole(passed_over):
            return Found(folder, manifest), None
    if any((folder.directory / name / MANIFEST).exists() for name in folder.all_names()):
        log.error("none of the checkpoints in %s can be restored: buffers and counters start afresh", folder.directory)
    else:
        log.info("no checkpoint in %s yet: this run starts afresh", folder.directory)
    return None, None


def place_of(folder: CheckpointFolder, path: Path) -> str:
    """Return how a run remembers where a checkpoint is, such that `folder.directory / place` leads there.

    That is its name within the run's folder, which may be moved, and otherwise its absolute path.
    """
    resolved = path.resolve()
    return resolved.name if resolved.parent == folder.directory.resolve() else str(resolved)


def _named(path: Path) -> Found:
    folder = CheckpointFolder(path.resolve().parent)
    try:
        log.info("verifying %s", path)
        return Found(folder, folder.verify(path.resolve().name))
    except CheckpointError as error:
        raise ConfigurationError(f"checkpoint={path} cannot be restored: {error}") from None


def misfitting_values(found: Found, agreement: Mapping[str, Any]) -> list[str]:
    """Return the differing values of the agreement on which a service's state depends, one line each."""
    theirs = found.manifest.agreement
    return [
        f"{key}: {theirs.get(key, 'absent')} there, {agreement.get(key, 'absent')} here"
        for key in sorted({*theirs, *agreement})
        if key.startswith(MUST_FIT) and theirs.get(key) != agreement.get(key)
    ]


def misfits(found: Found, agreement: Mapping[str, Any], expected: Sequence[str]) -> list[str]:
    """Return the parts of a checkpoint that do not fit this configuration, one line each."""
    told = misfitting_values(found, agreement)
    there = {name for name, service in found.manifest.services.items() if service["role"] == "trainer"}
    told += [f"trainer {name} is not in this configuration" for name in sorted(there - set(expected))]
    known = {*found.manifest.services, *found.manifest.about.get("left_out", [])}
    told += [f"{name} is not in the checkpoint" for name in expected if name not in known]
    return told


def check_fit(found: Found, agreement: Mapping[str, Any], expected: Sequence[str], partial: bool) -> None:
    """Raise ConfigurationError if something does not fit and may not start afresh; otherwise log it."""
    told = misfits(found, agreement, expected)
    if not told:
        return
    name = found.manifest.name
    if not partial:
        raise ConfigurationError(
            f"checkpoint {name} does not fit this configuration ({'; '.join(told[:6])}): undo the change, choose "
            f"another run_dir, or let what does not fit start afresh with checkpoint.allow=partial"
        )
    for line in told:
        log.warning("checkpoint %s: %s: it starts afresh", name, line)


def differing_models(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """Return the models whose configurations differ."""
    keys = (key for key in {*theirs, *ours} if key.startswith("models.") and theirs.get(key) != ours.get(key))
    return {key.split(".")[1] for key in keys}


def snapshots(found: Found, agreement: Mapping[str, Any], version_of: Callable[[str], int]) -> list[Snapshot]:
    """Return those of the checkpoint's models that fit, as snapshots.

    Args:
        found: the checkpoint.
        agreement: see config.agreement().
        version_of: returns the version that a model gets; 0 = it is omitted.
    """
    taken, others = [], differing_models(found.manifest.agreement, agreement)
    for path in found.manifest.files:
        model = path.removeprefix("models/").removesuffix(".json")
        if path != f"models/{model}.json" or model in others or (version := version_of(model)) <= 0:
            continue
        names = [f"models/{model}.json", f"models/{model}.safetensors"]
        files = {name: found.folder.read_whole(found.manifest.name, name) for name in names}
        try:
            arrays = from_files(f"models/{model}", files)
        except WireError as error:
            raise ConfigurationError(f"checkpoint {found.manifest.name}: {error}") from None
        taken.append(Snapshot(model, version, found.manifest.created, arrays))
        log.info("%s: restored from checkpoint %s, as version %d", model, found.manifest.name, version)
    return taken
