"""What services, models and checkpoints may be called: their names become parts of files' names, on every system."""

from __future__ import annotations

import re

NAME_RULE = (
    "ASCII letters, digits, _ . - only, at most 64, neither begins with . or - nor ends with ., "
    "and is no device of Windows (con, nul …)"
)
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}  # by Windows


def is_name(text: str) -> bool:
    """Whether a text follows NAME_RULE, and is no device of Windows."""
    fits = re.fullmatch(r"\w[\w.-]{0,63}(?<!\.)", text, re.ASCII) is not None
    return fits and text.partition(".")[0].lower() not in RESERVED
