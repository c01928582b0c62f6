"""URIs as they may be shown: a camera's, a tracker's."""

from __future__ import annotations

import re


def without_passwords(text: str) -> str:
    """Return a text without the passwords in its URIs."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]*@", r"\1:***@", text)
