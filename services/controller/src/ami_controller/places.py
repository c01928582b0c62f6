"""Where the system listens and writes: checked before anything is begun."""

from __future__ import annotations

import logging
from pathlib import Path

from ami_shared.bus import is_loopback
from ami_shared.errors import ConfigurationError

log = logging.getLogger(__name__)


def check_bind_address(host: str, keys: str | None, insecure: bool) -> bool:
    """Refuse to listen beyond this machine without keys, unless that was asked for explicitly.

    Returns:
        Whether the hub is open to a network.

    Raises:
        ConfigurationError: that was not asked for.
    """
    if keys is not None or is_loopback(host):
        return False
    if not insecure:
        raise ConfigurationError(
            f"controller.bind={host} listens beyond this machine without keys: `ami keys init` makes them for "
            f"controller.key_folder=keys, and `ami keys add NAME --role ROLE` one for each service that `ami up` does "
            f"not run; or, on a network without strangers, set controller.insecure=true"
        )
    log.warning("INSECURE: the hub listens on %s; whoever reaches it can read everything and command the system", host)
    return True


def prepare_run_dir(run_dir: Path) -> Path:
    """Make the run's directory; raise ConfigurationError if it cannot be written to."""
    return prepare_folder(run_dir, "run_dir")


def prepare_folder(folder: Path, key: str) -> Path:
    """Make a folder that the configuration names; raise ConfigurationError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(f"{key}={folder} cannot be written to: {error.strerror}") from None
    return folder
