"""How a service takes its part of a checkpoint back."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import pytest

from ami_shared import checkpoint_part
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


class Silent:
    """A controller that only listens."""

    checkpoint: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.heard: list[Message] = []

    def send(self, message: Message) -> None:
        self.heard.append(message)


def test_that_nothing_is_offered_of_a_cut_is_said_again_whenever_it_is_asked_for() -> None:
    link, cuts = Silent(), []
    part = CheckpointPart(Identity("ppo", "trainer"), link, cuts.append)
    for checkpoint in ("one", "one", "two"):
        part.heard(Message("save", "controller", "1", {"cut": [checkpoint, []]}))
        if not link.heard:
            part.refuse(cuts[-1], "encoder not finite")
    assert [cut.checkpoint for cut in cuts] == ["one", "two"]
    said = [(message.kind, message.get("checkpoint", str), message.get("reason", str)) for message in link.heard]
    assert said == [("unsaved", "one", "encoder not finite")] * 2


class Damaged:
    """A controller whose checkpoint `one` has another content than it should, and that has `two`."""

    def __init__(self) -> None:
        self.checkpoint = told_of("one")
        self.part: CheckpointPart | None = None
        self.damaged: list[str] = []

    def send(self, message: Message) -> None:
        if message.kind == "damaged":
            self.damaged.append(message.get("checkpoint", str))
            self.checkpoint = told_of("two")
            return
        piece = Piece.of(message)
        assert self.part
        content = CONTENT if piece.checkpoint == "two" else CONTENT.upper()
        self.part.heard(piece.answer("controller", "1", content))


def test_a_service_that_is_given_something_else_asks_for_another_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_part, "ASK_AGAIN_S", 0.01)
    link = Damaged()
    link.part = CheckpointPart(Identity("ppo", "trainer"), link)
    assert link.part.fetch(Gate()) == {"trainers/ppo.json": CONTENT}
    assert link.damaged == ["one"]
