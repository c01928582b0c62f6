"""What services, models and checkpoints may be called: names become parts of file names on every platform."""

from __future__ import annotations

import re

NAME_RULE = (
    "ASCII letters, digits, _ . - only, at most 64, neither begins with . or - nor ends with ., "
    "and is not a reserved Windows device name (con, nul …)"
)
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # by Windows


def is_name(text: str) -> bool:
    """Return whether a text follows NAME_RULE, reserved Windows device names included."""
    fits = re.fullmatch(r"\w[\w.-]{0,63}(?<!\.)", text, re.ASCII) is not None
    return fits and text.partition(".")[0].lower() not in RESERVED
