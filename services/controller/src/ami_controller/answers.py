"""Messages from the controller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ami_shared.wire import Message

NAME = "controller"
DENIED = "denied"

Outgoing = list[tuple[bytes, Message]]  # routing id of the peer, and the message to it


def answer(kind: str, fields: Mapping[str, Any] | None = None) -> Message:
    """Return a message from the controller."""
    return Message(kind, NAME, NAME, fields or {})
