"""Configuration: one experiment describes the whole system; each service takes its own part of it.

Composed by Hydra from the folder `configs/` (AMI_CONFIG_DIR, else this checkout's, else ./configs). A wrong name, type
or value is found before anything starts (config_schema.py, config_checks.py).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ami_shared import __version__, limits, priority
from ami_shared.bus import HubAddress
from ami_shared.config_checks import MOST_THREADS, check_policy_input, check_values
from ami_shared.config_schema import ExperimentSchema, TrainerServiceSchema
from ami_shared.errors import AmiError, ConfigurationError
from ami_shared.keys import KeyFile

VERBATIM = {"run_dir", "checkpoint.directory", "checkpoint.restore", "controller.key_folder", "join", "hub"}
BEGINNINGS = {"normalised"}  # keys of models that describe their initialisation only


def config_dir() -> Path:
    """Return the folder of configuration files; raise ConfigurationError if there is none."""
    named = os.environ.get("AMI_CONFIG_DIR")
    candidates = [Path(named)] if named else [Path(__file__).parents[3] / "configs", Path("configs")]
    for candidate in candidates:
        if (candidate / "config.yaml").is_file():
            return candidate.resolve()
    raise ConfigurationError(
        f"no config.yaml in {' or '.join(map(str, candidates))}: set AMI_CONFIG_DIR to the folder configs/"
    )


def load_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the experiment from the configuration folder and command-line overrides such as `seed=3`.

    Raises:
        ConfigurationError: unknown key, wrong type, unknown experiment, value out of range.
    """
    ConfigStore.instance().store("schema", ExperimentSchema)
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise ConfigurationError(f"{word!r} is not an override: write key=value, or --help")
        if word.startswith("trainer."):
            raise ConfigurationError(f"configuration: unknown key {word.partition('=')[0]!r}; did you mean trainers?")
        if word.startswith("trainers="):
            raise ConfigurationError(
                f"{word!r} would be merged with the existing trainers: write ~trainers.NAME to remove one"
            )
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            words = [_spelt_out(word) for word in overrides]
            try:
                config = compose("config", overrides=words)
            except ConfigCompositionException as error:
                if twice := re.match(r"Multiple values for ([\w/@.]*\w)", str(error)):
                    raise ConfigurationError(f"{twice[1]} is chosen already: write {twice[1]}=… without +") from None
                if not (unknown := re.match(r"Could not override '(.+?)'", str(error))):
                    raise
                raise ConfigurationError(_unknown_key(unknown[1], words)) from None
        check_policy_input(config)
        OmegaConf.resolve(config)
        assert isinstance(config, DictConfig)
        if missing := OmegaConf.missing_keys(config):
            raise ConfigurationError(f"configuration: no value for {', '.join(sorted(missing))}")
        check_values(config)
        _check_publishers(config)
    except OverrideParseException as error:
        raise ConfigurationError(f"configuration: {error.override!r} cannot be read: write key=value") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_one_line(error)) from None
    except AssertionError:  # raised by OmegaConf for a value below a section that is null
        raise ConfigurationError(
            f"this experiment has no such section (among {' '.join(overrides)}): leave `world.…` out if there is no "
            f"simulated world, or choose an experiment that has one"
        ) from None
    except ValueError as error:  # raised by Hydra for a group, such as `world`, that is given a value
        raise ConfigurationError(f"{_one_line(error)} (among {' '.join(overrides)})") from None
    return config


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Return what to say of an override of a key that does not exist, with the most similar one that does."""
    known: dict[str, Any] = {}
    with contextlib.suppress(HydraException, OmegaConfBaseException, AssertionError, ValueError):  # another wrong one
        rest = [word for word in overrides if word.partition("=")[0] != key]
        _flatten("", OmegaConf.to_container(compose("config", overrides=rest)), known)
    last = key.rpartition(".")[2]
    groups = [folder.name for folder in config_dir().iterdir() if folder.is_dir()]
    near = get_close_matches(f".{key}", known, n=9, cutoff=0.8)
    similar = [name[1:] for name in near if get_close_matches(last, [name.rpartition(".")[2]])]
    similar = similar[:1] or get_close_matches(key, {*groups} - {key}, n=1, cutoff=0.8)
    if not similar and key not in groups:
        similar = [name[1:] for name in known if name.endswith(f".{key}")][:3]
    hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
    return f"configuration: unknown key {key!r} (to add an argument of a component, write +{key}=VALUE){hint}"


def _spelt_out(override: str) -> str:
    """Quote values that Hydra would not take literally, such as paths, and expand the short key checkpoint=."""
    name, equals, value = override.partition("=")
    name = "checkpoint.restore" if name == "checkpoint" else name
    if not equals or _means_itself(name, value):
        return f"{name}{equals}{value}"
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value)
    return f'{name}="{escaped}"'


def _means_itself(name: str, value: str) -> bool:
    """Return whether Hydra takes a value literally: it is quoted, a list or map, or has nothing that Hydra rewrites."""
    if len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]:
        return True
    if name in VERBATIM:
        return value == "null"
    if value[:1] in ("[", "{"):
        return True
    try:
        one_value = not OverridesParser.create().parse_override(f"{name}={value}").is_sweep_override()
        return "\\" not in value and one_value
    except (HydraException, OmegaConfBaseException):
        return False


def _one_line(error: BaseException) -> str:
    parts = [str(error)]
    if error.__cause__ is not None and str(error.__cause__) not in parts[0]:
        parts.append(str(error.__cause__))
    text = "; ".join(re.sub(r"([.:]?)\s*\n\s*", lambda m: ": " if m[1] == ":" else ", ", p.strip()) for p in parts)
    text = re.sub(r", Config search path:.*", "", text)
    text = re.sub(r",? ?(reference_type|object_type)[=:] ?(\w+\[.*?\]+|\S+)", "", text)
    text = re.sub(r",? ?full_key[=:] ?([^\s,]+)", r" at \1", text)
    return f"configuration: {text}"


def _check_publishers(config: DictConfig) -> None:
    publisher: dict[str, str] = {}
    for name in config.trainers:
        for model in trainer_service(config, name).publishes or []:
            if publisher.setdefault(model, name) != name:
                raise ConfigurationError(
                    f"trainers {publisher[model]} and {name} both publish {model}: remove one of them"
                )


def hub_of(config: DictConfig, role: str, name: str) -> HubAddress:
    """Return the hub to connect to as the service of this role and name, with the credentials of its key file.

    Raises:
        ConfigurationError: the key file cannot be used, or belongs to another service.
    """
    hub = HubAddress.parse(config.hub)
    if not config.join:
        return hub
    key = KeyFile.load(Path(config.join))
    if (key.role, key.name) != (role, name):
        raise ConfigurationError(f"key file {config.join} belongs to {key.role} {key.name}, but this is {role} {name}")
    return hub.with_credentials(key.credentials)


def trainer_service(config: DictConfig, name: str) -> DictConfig:
    """Return `trainers.<name>.service`, checked; raise ConfigurationError if a value is invalid."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainerServiceSchema), config.trainers[name].get("service") or {})
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"trainers.{name}.service: {_one_line(error)}") from None
    assert isinstance(merged, DictConfig)
    if not (merged.publish_interval > 0 and merged.picture_interval > 0):
        raise ConfigurationError(f"trainers.{name}.service: intervals must be above 0")
    if merged.threads is not None and not 1 <= merged.threads <= MOST_THREADS:
        raise ConfigurationError(f"trainers.{name}.service.threads={merged.threads} must be 1 to {MOST_THREADS}")
    if merged.priority not in priority.WEAK:
        raise ConfigurationError(
            f"trainers.{name}.service.priority={merged.priority!r} must be one of {', '.join(priority.WEAK)}"
        )
    if merged.wire_precision not in ("full", "bfloat16"):
        raise ConfigurationError(
            f"trainers.{name}.service.wire_precision={merged.wire_precision!r} must be full or bfloat16"
        )
    return merged


def loop_priority(config: DictConfig) -> str:
    """Return the priority that a body's loop asks for: a loop without intervals never rests, and must not be ahead."""
    rests = config.pace == "realtime" and config.inference.interval > 0
    return str(config.inference.priority) if rests else "normal"


def agreement(config: DictConfig) -> dict[str, Any]:
    """Return the values that must be equal on all machines, as a flat map: the controller compares them key by key.

    How models are initialised is not among them: that does not affect models that have already learned.
    """
    flat: dict[str, Any] = {"protocol": limits.PROTOCOL_VERSION, "code": __version__}
    for key in ("name", "seed", "pace", "lockstep_window", "policy_input", "observation", "action", "models"):
        _flatten(key, OmegaConf.to_container(OmegaConf.create({key: config[key]}))[key], flat)  # type: ignore[index,call-overload]
    flat = {key: value for key, value in flat.items() if key.rpartition(".")[2] not in BEGINNINGS}
    flat["inference.interval"] = float(config.inference.interval)
    return flat


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}", item, into)
    else:
        into[prefix] = value


def build(section: Any, where: str, **arguments: Any) -> Any:
    """Make the component that a section's `_target_` names.

    Args:
        section: its `_target_` and arguments.
        where: the section's dotted key, for error messages.
        arguments: further keyword arguments, from the code.

    Raises:
        ConfigurationError: no such class, an unknown or missing argument, or an argument that the class refuses.
        AmiError: a peer that the component needs cannot be reached, or whatever else may be over soon.
        MemoryError: or torch's error of that name for a GPU.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if "_target_" not in section:
        raise ConfigurationError(f"{where}: no _target_ says which class to make")
    try:
        return instantiate(section, **arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, AmiError | MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            raise cause from None
        if isinstance(cause, ConnectionError | TimeoutError):
            raise AmiError(f"{where} ({section['_target_']}): {_one_line(cause)}") from None
        raise ConfigurationError(f"{where} ({section['_target_']}): {_one_line(cause)}") from None
