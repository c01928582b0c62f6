"""URIs: of a tracker's database, and as they may be shown."""

from __future__ import annotations

import re
from pathlib import Path


def sqlite_uri(path: Path) -> str:
    """Return the URI of a database file, whatever characters its path has."""
    return "sqlite:///" + re.sub("[%?]", lambda found: f"%{ord(found[0]):02X}", str(path.resolve()))


def without_passwords(text: str) -> str:
    """Return a text without the passwords in its URIs."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]*@", r"\1:***@", text)
