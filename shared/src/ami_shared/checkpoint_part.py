"""A service's part in checkpoints: offers its state as of a cut, and restores it at the start."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ami_shared import checkpoints
from ami_shared.checkpoints import Cut, Described, Fetching, Offered, Piece
from ami_shared.errors import ConfigurationError, WireError
from ami_shared.gate import Gate
from ami_shared.membership import Identity
from ami_shared.state import DOES_NOT_FIT, Tree, from_files, names_of, to_files
from ami_shared.wire import Message

log = logging.getLogger(__name__)

SAY_AFTER_S = 10.0
ASK_AGAIN_S = 1.0


class Link(Protocol):
    """What is needed here of the link to the controller."""

    @property
    def checkpoint(self) -> Mapping[str, Any]: ...

    def send(self, message: Message) -> None: ...


class CheckpointPart:
    """Stands between the control link, which brings requests, and a loop, which takes cuts."""

    def __init__(self, identity: Identity, link: Link, on_save: Callable[[Cut], None] = lambda cut: None) -> None:
        """Start with nothing offered.

        Args:
            identity: this service.
            link: the link to the controller.
            on_save: called once, in the link's thread, with each cut that the controller requests.
        """
        self._identity, self._link, self._on_save = identity, link, on_save
        self._offered = Offered()
        self._fetching: Fetching | None = None
        self._came = threading.Event()
        self._wished = ""
        self._refused: tuple[str, str] | None = None  # a checkpoint, and why nothing can be offered of it

    def heard(self, message: Message) -> bool:
        """Handle a message from the controller; return whether it was about checkpoints. Raises WireError."""
        match message.kind:
            case checkpoints.SAVE:
                self._save(Cut.from_list(message.get("cut", list)))
            case checkpoints.GET_PART:
                self._answer(Piece.of(message))
            case checkpoints.PART:
                if fetching := self._fetching:
                    fetching.take(message)
                self._came.set()
            case checkpoints.FORGET:
                self._offered.forget(message.get("checkpoint", str))
            case _:
                return False
        return True

    def _save(self, cut: Cut) -> None:
        if sizes := self._offered.sizes(cut.checkpoint):
            self._send(checkpoints.OFFER, checkpoint=cut.checkpoint, files=sizes)
        elif self._refused and self._refused[0] == cut.checkpoint:
            self._say_unsaved(*self._refused)
        elif cut.checkpoint != self._wished:
            self._wished = cut.checkpoint
            self._on_save(cut)

    def _answer(self, piece: Piece) -> None:
        if content := self._offered.read(piece):
            self._link.send(piece.answer(self._identity.name, self._identity.incarnation, content))

    def taken(self, cut: Cut, trees: Mapping[str, Tree]) -> None:
        """Offer the state as of a cut.

        Args:
            trees: file name → tree; its arrays must not change any more.
        """
        try:
            files = [file for name, tree in trees.items() for file in to_files(name, tree)]
        except TypeError as error:
            self.refuse(cut, str(error))
            return
        self._offered.put(cut.checkpoint, files)
        self._send(checkpoints.OFFER, checkpoint=cut.checkpoint, files=self._offered.sizes(cut.checkpoint))

    def refuse(self, cut: Cut, reason: str) -> None:
        """Report that nothing can be offered for this cut, and why: the previous checkpoint stays the newest."""
        log.error("nothing is saved of %s: %s", self._identity.name, reason)
        self._refused = (cut.checkpoint, reason)
        self._say_unsaved(*self._refused)

    def _say_unsaved(self, checkpoint: str, reason: str) -> None:
        self._send(checkpoints.UNSAVED, checkpoint=checkpoint, reason=reason)

    def _send(self, kind: str, **fields: Any) -> None:
        self._link.send(self._identity.message(kind, fields))

    def fetch(self, gate: Gate) -> Mapping[str, bytearray] | None:
        """Wait for the files of this service's last checkpoint: empty without a checkpoint, None if asked to stop.

        A restarted controller may continue from another checkpoint, and so may one that is told that the files did not
        arrive as they were written: then the files are those of that checkpoint.
        """
        told: Mapping[str, Any] = {}
        said_at = time.monotonic()
        while True:
            if self._fetching is None or self._link.checkpoint != told:
                told = self._link.checkpoint
                files = Described.all_of(told.get("files")) if told else []
                self._fetching = Fetching(str(told.get("checkpoint")), files)
            fetching = self._fetching
            if fetching.complete:
                try:
                    whole = fetching.files()
                except WireError as error:
                    log.error("%s: asking the controller for another checkpoint", error)
                    self._send(checkpoints.DAMAGED, checkpoint=fetching.checkpoint)
                    self._fetching = None
                    gate.wait_for_change(gate.desired, timeout_s=ASK_AGAIN_S)
                    continue
                self._fetching = None
                return whole
            if not gate.may_wait():
                return None
            if piece := fetching.wish(time.monotonic()):
                self._send(checkpoints.GET_PART, **piece.fields())
            self._came.wait(0.1)
            self._came.clear()
            if time.monotonic() - said_at > SAY_AFTER_S:
                said_at = time.monotonic()
                log.warning("still waiting for the controller's checkpoint %s", fetching.checkpoint)

    def restore(self, gate: Gate, restore: Callable[[Mapping[str, Tree]], None], partial: bool) -> bool:
        """Fetch this service's last state and hand it to `restore`; return False if asked to stop while waiting.

        Args:
            gate: tells whether the service should stop.
            restore: takes the trees that were given to taken(); raises WireError if something does not fit, after
                restoring what does.
            partial: whether what does not fit may start afresh.

        Raises:
            ConfigurationError: the state does not fit, and may not start afresh.
        """
        try:
            files = self.fetch(gate)
            if files is None:
                return False
            if files:
                restore({name: from_files(name, files) for name in names_of(files)})
                log.info(
                    "%s continues from checkpoint %s", self._identity.name, self._link.checkpoint.get("checkpoint")
                )
        except DOES_NOT_FIT as error:
            told = " ".join(str(error).split())
            why = f"{type(error).__name__} {told}" if isinstance(error, KeyError | IndexError) else told
            where = f"checkpoint {self._link.checkpoint.get('checkpoint')} does not fit {self._identity.name}"
            if not partial:
                raise ConfigurationError(
                    f"{where} ({why:.300}): undo the change, or let it start afresh with checkpoint.allow=partial"
                ) from None
            log.warning("%s (%s): it starts afresh", where, why)
        return True
