"""What a run continues from: which checkpoint, whether it fits, and its models as snapshots for replicas."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
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
MODELS = "models."
MUST_FIT = (MODELS, "observation.", "action.", "policy_input")


def find(
    folder: CheckpointFolder, wish: str | None, taken_back_to: str | None, behind: int = -1, last: int = 0
) -> tuple[Found | None, str | None]:
    """Find and verify the requested checkpoint.

    Args:
        folder: of this run.
        wish: latest, a name in the folder, a path, or None.
        taken_back_to: the place to which this run has been taken back already; that is done once.
        behind: number of the last checkpoint at that time; the run was taken back from those up to it.
        last: number of the last checkpoint that this run has made.

    Returns:
        The checkpoint to continue from, if any; and its place if the run is taken back to it now.

    Raises:
        ConfigurationError: the named checkpoint is damaged or missing, this user may not read the checkpoints, or all
            that this run has made are gone.
    """
    if wish is None:
        return None, None
    folder.check_readable()
    if wish != LATEST:
        own = folder.directory / wish
        path = own if own.is_dir() else Path(wish)
        if taken_back_to not in (place_of(folder, own), place_of(folder, path)):
            if not path.is_dir():
                raise ConfigurationError(
                    f"checkpoint={wish}: {folder.directory} has no checkpoint of this name, and there is no folder "
                    f"{path} either: `ami checkpoints` lists them"
                )
            return _named(path), place_of(folder, path)
        log.info("this run was taken back to %s already: it continues from its later state", path)
    passed_over = partial(log.error, "a damaged checkpoint is skipped: %s")
    if manifest := folder.newest_whole(passed_over, behind if taken_back_to else -1):
        if manifest.number < last:
            log.warning("the last checkpoint of this run, number %d, is gone or damaged: an older one is used", last)
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
    elif last > 0:
        raise ConfigurationError(
            f"{folder.directory} has no checkpoint, but this run has made some: is its disk mounted? If they are gone, "
            f"checkpoint=null continues without them, from the parameters alone"
        )
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
    keys = {key for key in {*theirs, *agreement} if key.startswith(MUST_FIT) and not key.startswith(MODELS)}
    differing = {key for key in keys if theirs.get(key) != agreement.get(key)} | differing_values(theirs, agreement)
    return [
        f"{key}: {theirs.get(key, 'absent')} in the checkpoint, {agreement.get(key, 'absent')} in this configuration"
        for key in sorted(differing)
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
        log.warning("checkpoint %s does not fit: %s", name, line)


def differing_models(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """Return the models whose configurations differ, and that both sides have."""
    return {_model_of(key) for key in differing_values(theirs, ours)}


def differing_values(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    """Return the keys of models whose values differ, of models that both sides have: newer code may have more."""
    both = described_models(theirs) & described_models(ours)
    keys = {key for key in {*theirs, *ours} if key.startswith(MODELS) and theirs.get(key) != ours.get(key)}
    return {key for key in keys if _model_of(key) in both}


def described_models(agreement: Mapping[str, Any]) -> set[str]:
    """Return the models that are configured, and not null."""
    keys = (key for key in agreement if key.startswith(MODELS))
    return {_model_of(key) for key in keys if key.count(".") > 1 or agreement[key] is not None}


def without_models(agreement: Mapping[str, Any], models: Collection[str]) -> dict[str, Any]:
    """Return what describes other models than these."""
    return {key: value for key, value in agreement.items() if key.startswith(MODELS) and _model_of(key) not in models}


def _model_of(key: str) -> str:
    return key.split(".")[1]


def snapshots(found: Found, agreement: Mapping[str, Any], version_of: Callable[[str], int]) -> list[Snapshot]:
    """Return those of the checkpoint's models that fit, as snapshots.

    Args:
        found: the checkpoint.
        agreement: see config.agreement().
        version_of: returns the version that a model gets; 0 = it is omitted.
    """
    theirs = found.manifest.agreement
    others = differing_models(theirs, agreement) | (described_models(agreement) - described_models(theirs))
    taken = []
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
