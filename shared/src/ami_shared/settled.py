"""A trainer's notice that it has learned what it could from the experience so far; bodies in lockstep wait for it.

They wait at the ends of windows, each of so many steps. What a step was worth, only the record behind it tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ami_shared.errors import WireError
from ami_shared.wire import Message

TOPIC = b"settled/"
MESSAGE_TYPE = "settled"


def is_window_end(records: int, window: int) -> bool:
    """Whether a body in lockstep waits behind so many records: those of whole windows of steps, and the one behind.

    So a rollout that is as long as a window is whole where all wait, and the policy that acted learns from it.
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
        """Read a notice; raise WireError where something is off."""
        if message.kind != MESSAGE_TYPE:
            raise WireError(f"message {message.kind!r:.40} is not a notice of a trainer")
        frontiers, versions = message.get("frontiers", dict), message.get("versions", dict)
        for name, number in (*frontiers.items(), *versions.items()):
            if not isinstance(name, str) or type(number) is not int:
                raise WireError("settled: frontiers and versions must be maps from names to numbers")
        return cls(message.sender, frontiers, versions)
