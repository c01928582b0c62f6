"""What services, models and checkpoints may be called: their names become parts of files' names, on every system."""

from __future__ import annotations

import re

NAME_RULE = "ASCII letters, digits, _ . - only, at most 64, and does not begin with . or -"


def is_name(text: str) -> bool:
    """Whether a text follows NAME_RULE."""
    return re.fullmatch(r"\w[\w.-]{0,63}", text, re.ASCII) is not None
