"""What the configured values must be, beyond their types."""

from __future__ import annotations

import math
import re
from typing import TypeGuard

from omegaconf import DictConfig, ListConfig, OmegaConf

from ami_shared import priority
from ami_shared.bus import HubAddress
from ami_shared.errors import ConfigurationError
from ami_shared.names import NAME_RULE, is_name

LONGEST_INTERVAL_S = 10.0  # of a body, which reacts to requests only between two steps
MOST_THREADS = 1_024
MOST_PIXELS = 4_096  # of a frame's side
MOST_RETAINED_MB = 1_000_000
LONGEST_WAIT_S = 86_400.0  # no thread may wait longer; on Windows waits of about two months overflow
AT_LEAST = {
    "lockstep_window": 1,
    "inference.torch_threads": 1,
    "inference.lateness_tolerance": 0,
    "inference.retained_mb": 1,
    "tracker.write_interval": 0.05,
    "tracker.metrics_interval": 0,
    "checkpoint.first_after": 0,
    "checkpoint.timeout": 1,
    "checkpoint.keep.newest": 1,
    "checkpoint.keep.hourly": 0,
    "checkpoint.keep.daily": 0,
    "checkpoint.keep.weekly": 0,
}


def is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether a configured value is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_policy_input(config: DictConfig) -> None:
    """Check the trunk's name before it is resolved: OmegaConf would only report a missing interpolation key."""
    trunks = config.models.get("trunks")
    if isinstance(trunks, DictConfig) and config.policy_input not in trunks:
        raise ConfigurationError(
            f"policy_input={config.policy_input!r} is not among the trunks of these models: {', '.join(trunks)}"
        )


def check_values(config: DictConfig) -> None:
    """Raise ConfigurationError if a value of the composed configuration is out of range."""
    for check in (_check_experiment, _check_least, _check_body, _check_trainers, _check_controller):
        check(config)


def _check_experiment(config: DictConfig) -> None:
    HubAddress.parse(config.hub)
    for key in ("run_dir", "checkpoint.directory", "tracker.experiment"):
        if not OmegaConf.select(config, key).strip():
            raise ConfigurationError(f"{key}= is empty")
    if not is_name(config.name):
        raise ConfigurationError(f"name={config.name!r} is not a valid name, which has {NAME_RULE}")
    if not (0 < config.observation.height <= MOST_PIXELS and 0 < config.observation.width <= MOST_PIXELS):
        raise ConfigurationError(f"observation.height and observation.width must be 1 to {MOST_PIXELS} pixels")
    if config.pace not in ("realtime", "free", "lockstep"):
        raise ConfigurationError(f"pace={config.pace!r} must be realtime, free or lockstep")
    if not 0 <= config.seed < 1 << 32:
        raise ConfigurationError(f"seed={config.seed} must be 0 to {(1 << 32) - 1}")
    if not config.action.choices or any(n < 1 for n in config.action.choices):
        raise ConfigurationError(f"action.choices={list(config.action.choices)} must be whole numbers, 1 or more")


def _check_least(config: DictConfig) -> None:
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(config, key)
        if not (math.isfinite(value) and value >= least):
            raise ConfigurationError(f"{key}={value} must be {least} or more")


def _check_body(config: DictConfig) -> None:
    body, interval = config.inference, config.inference.interval
    _check_service_name("inference.name", body.name)
    if not 0 <= interval <= LONGEST_INTERVAL_S:
        raise ConfigurationError(
            f"inference.interval={interval} must be 0 (as fast as it goes) to {LONGEST_INTERVAL_S:g} seconds"
        )
    if body.retained_mb > MOST_RETAINED_MB:
        raise ConfigurationError(f"inference.retained_mb must be at most {MOST_RETAINED_MB}")
    if body.torch_threads > MOST_THREADS:
        raise ConfigurationError(f"inference.torch_threads must be at most {MOST_THREADS}")
    if body.priority not in priority.STRONG:
        raise ConfigurationError(f"inference.priority={body.priority!r} must be one of {', '.join(priority.STRONG)}")
    for key in ("environment", "agent"):
        if "_target_" not in body[key]:
            raise ConfigurationError(f"inference.{key}: no _target_ says which class to make")
    for key in ("sensor", "actuator"):
        if OmegaConf.select(body, f"environment.{key}", default="") is None:
            raise ConfigurationError(f"inference.environment.{key}=null: a body needs one; see configs/experiment/")
    silence = OmegaConf.select(body, "environment.actuator.max_silence")
    if isinstance(silence, int | float) and silence < 2 * interval:
        raise ConfigurationError(
            f"inference.environment.actuator.max_silence={silence:g} is less than two intervals of {interval:g} s: the "
            f"watchdog would release all controls between two steps"
        )
    known = [name for name, section in config.models.items() if name != "trunks" and section is not None]
    followed = body.agent.get("models", [])
    if not isinstance(followed, list | ListConfig) or any(name not in known for name in followed):
        raise ConfigurationError(f"inference.agent.models={followed} must be a list of some of {', '.join(known)}")


def _check_trainers(config: DictConfig) -> None:
    for name, section in config.trainers.items():
        _check_service_name(f"trainers.{name}", name)
        if not isinstance(section, DictConfig) or not isinstance(section.get("service", {}), DictConfig | dict):
            raise ConfigurationError(
                f"trainers.{name} must be a section with a section `service`; to remove it, write ~trainers.{name}"
            )
    if config.trainers and config.trainer not in config.trainers:
        raise ConfigurationError(
            f"trainer={config.trainer!r} is not part of experiment {config.name!r}; "
            f"it has: {', '.join(config.trainers)}"
        )


def _check_controller(config: DictConfig) -> None:
    uri, save = config.tracker.uri, config.checkpoint
    if uri is not None and not re.match(r"databricks|[A-Za-z][\w+.-]+:", uri):
        raise ConfigurationError(f"tracker.uri={uri} is not an address: set http://HOST:5000, sqlite:///FILE, or null")
    if config.tracker.write_interval > LONGEST_WAIT_S:
        raise ConfigurationError(f"tracker.write_interval={config.tracker.write_interval} must be at most a day")
    if save.interval is not None and not save.interval >= 1:
        raise ConfigurationError(f"checkpoint.interval={save.interval} must be 1 second or more, or null")
    if save.allow not in ("all", "partial"):
        raise ConfigurationError(f"checkpoint.allow={save.allow!r} must be all or partial")


def _check_service_name(key: str, name: object) -> None:
    if not is_name(str(name)):
        raise ConfigurationError(f"{key}: {name!r} is not a valid service name, which has {NAME_RULE}")
