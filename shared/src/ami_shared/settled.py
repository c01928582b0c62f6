"""A trainer's notice that it has learned all it can from the experience so far; bodies in lockstep wait for it.

They wait at the ends of windows of a fixed number of steps. The reward of a step is in the record after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ami_shared.errors import WireError
from ami_shared.wire import Message

TOPIC = b"settled/"
MESSAGE_TYPE = "settled"


def is_window_end(records: int, window: int) -> bool:
    """Return whether a body in lockstep waits after this many records: those of whole windows, plus one.

    So a rollout that is as long as a window is complete when all wait, and the policy that acted learns from it.
    """
    return records == 0 or (records - 1) % window == 0


@dataclass(frozen=True)
class Settled:
    """How far a trainer has come.

    Attributes:
        frontiers: incarnation of a body → number of the first record that it has not learned from.
        versions: model → version of the parameters published after that.
    """

    trainer: str
    frontiers: Mapping[str, int]
    versions: Mapping[str, int]

    def to_message(self, incarnation: str) -> Message:
        """Return the message that from_message() reads back."""
        fields = {"frontiers": dict(self.frontiers), "versions": dict(self.versions)}
        return Message(MESSAGE_TYPE, self.trainer, incarnation, fields, topic=TOPIC + self.trainer.encode())

    @classmethod
    def from_message(cls, message: Message) -> Settled:
        """Parse a notice; raise WireError if it is malformed."""
        if message.kind != MESSAGE_TYPE:
            raise WireError(f"message {message.kind!r:.40} is not a notice of a trainer")
        frontiers, versions = message.get("frontiers", dict), message.get("versions", dict)
        for name, number in (*frontiers.items(), *versions.items()):
            if not isinstance(name, str) or type(number) is not int:
                raise WireError("settled: frontiers and versions must be maps from names to numbers")
        return cls(message.sender, frontiers, versions)
