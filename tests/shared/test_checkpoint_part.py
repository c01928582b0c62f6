"""How a service takes its part of a checkpoint back."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from ami_shared.checkpoint_part import CheckpointPart
from ami_shared.checkpoints import Piece
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.wire import Message

CONTENT = b"what was remembered"


def told_of(checkpoint: str) -> Mapping[str, Any]:
    return {"checkpoint": checkpoint, "files": [["trainers/ppo.json", len(CONTENT), sha256(CONTENT).hexdigest()]]}


class StartedAnew:
    """A controller that goes on from `two` as soon as somebody asks for a piece of `one`."""

    def __init__(self) -> None:
        self.checkpoint = told_of("one")
        self.part: CheckpointPart | None = None

    def send(self, message: Message) -> None:
        piece = Piece.of(message)
        if piece.checkpoint == "one":
            self.checkpoint = told_of("two")
            return
        assert self.part
        self.part.heard(piece.answer("controller", "1", CONTENT))


def test_a_service_fetches_the_checkpoint_that_the_controller_goes_on_from_now() -> None:
    link = StartedAnew()
    link.part = CheckpointPart(Identity("ppo", "trainer"), link)
    assert link.part.fetch(Gate()) == {"trainers/ppo.json": CONTENT}
