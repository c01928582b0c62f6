"""Checks of trainers' settings. They name the keys below `trainers.NAME`, which the service replaces: see naming()."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ami_shared.config_checks import is_finite_number
from ami_shared.errors import ConfigurationError


@contextmanager
def naming(trainer: str) -> Iterator[None]:
    """Let configuration errors of the block name this trainer: its parts do not know where they are configured."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("trainers.NAME.", f"trainers.{trainer}.")) from None


def check_counts(**values: object) -> None:
    """Raise ConfigurationError if a value is not a whole number, 1 or more."""
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ConfigurationError(f"trainers.NAME.{name}={value!r} must be a whole number, 1 or more")


def check_positive(**values: Any) -> None:
    """Raise ConfigurationError if a value is not a finite number above 0."""
    for name, value in values.items():
        if not is_finite_number(value) or not value > 0:
            raise ConfigurationError(f"trainers.NAME.{name}={value!r} must be a number above 0")


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def check_numbers(least: float = 0.0, most: float = math.inf, **values: Any) -> None:
    """Raise ConfigurationError if a value is not a finite number in [least, most]."""
    for name, value in values.items():
        if not is_finite_number(value) or not least <= value <= most:
            raise ConfigurationError(f"trainers.NAME.{name}={value!r} must be a number from {least:g} to {most:g}")
