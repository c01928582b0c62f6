"""The command line that all services have: overrides, --help, --cfg, --health."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ami_shared.bus import HubAddress
from ami_shared.command import StopFlag
from ami_shared.config import load_config
from ami_shared.errors import AmiError, ConfigurationError
from ami_shared.health import health_path, read_health
from ami_shared.keys import KeyFile

SHORT_FOR = {
    ("controller", "--insecure"): "controller.insecure=true",
    ("body", "--take-over"): "take_over=true",
    ("trainer", "--take-over"): "take_over=true",
}

NAME_KEYS = {"body": "inference.name", "trainer": "trainer"}

Serve = Callable[[list[str], StopFlag], None]


class UnhealthyError(AmiError):
    """The service whose health was asked for is not healthy."""


def service_main(role: str, arguments: list[str], stop: StopFlag, usage: str, serve: Serve) -> None:
    """Answer --help, --cfg and --health, or run the service."""
    if {"-h", "--help"} & set(arguments):
        print(usage, end="")
        return
    arguments = spelt_out(role, arguments)
    overrides = [word for word in arguments if not word.startswith("-")]
    options = {word for word in arguments if word.startswith("-")}
    if options == {"--cfg"}:
        print(OmegaConf.to_yaml(load_config(overrides)), end="")
    elif options == {"--health"}:
        config = load_config(overrides)
        tell_health(HubAddress.parse(config.hub).port, role, service_name(role, config))
    elif options:
        print(usage, end="", file=sys.stderr)
        raise _UsageError(f"unknown option {', '.join(sorted(options))}")
    else:
        serve(overrides, stop)


def spelt_out(role: str, arguments: list[str]) -> list[str]:
    """Turn `--join FILE` (default: AMI_JOIN) and other short forms into overrides.

    The file's hub and name apply unless a later word overrides them; a trainer's name may be given alone.

    Raises:
        ConfigurationError: the key file cannot be used, or is for another role.
    """
    words, path = list(arguments), None
    if "--join" in words:
        at = words.index("--join")
        if at + 1 == len(words):
            raise ConfigurationError("--join needs the path of a key file")
        path = Path(words[at + 1])
        del words[at : at + 2]
    elif role in NAME_KEYS and not any(word.startswith("join=") for word in words):
        path = Path(named) if (named := os.environ.get("AMI_JOIN")) else None
    if role == "trainer":
        words = [word if "=" in word or not re.fullmatch(r"\w[\w.-]*", word) else f"trainer={word}" for word in words]
    words = [SHORT_FOR.get((role, word), word) for word in words]
    if path is None:
        return words
    key = KeyFile.load(path)
    if key.role != role:
        raise ConfigurationError(f"key file {path} is for the role {key.role}, but this is a {role}")
    hub = [] if "--join" not in arguments and "AMI_HUB" in os.environ else [f"hub={key.hub}"]
    return [f'join="{path.resolve()}"', *hub, f"{NAME_KEYS[role]}={key.name}", *words]


class _UsageError(AmiError):
    exit_code = 2


def service_name(role: str, config: DictConfig) -> str:
    """Return the name under which a service of this role joins the system."""
    names = {"body": str(config.inference.name), "trainer": str(config.trainer)}
    return names.get(role, role)


def tell_health(hub_port: int, role: str, name: str) -> None:
    """Print one line; raise UnhealthyError if the service is not healthy."""
    healthy, line = read_health(health_path(hub_port, role, name))
    if not healthy:
        raise UnhealthyError(f"{role} {name}: {line}")
    print(f"{role} {name}: {line}")
