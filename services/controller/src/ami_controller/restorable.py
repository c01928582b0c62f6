"""What joining services continue from: this run's newest checkpoint that is intact, and of a service that was not part
of it, the newest one that has its state.

A checkpoint that cannot be read, or that a service received otherwise than it was saved, is verified in the background;
if it is damaged, services that join from then on get the next best one.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ami_controller.answers import NAME, Outgoing, answer
from ami_controller.checkpoint_files import CheckpointFolder, Found, Manifest
from ami_controller.registry import Member, Registry
from ami_controller.restoring import misfits, misfitting_values
from ami_controller.state import RunState
from ami_shared import limits
from ami_shared.checkpoints import Piece
from ami_shared.errors import WireError
from ami_shared.wire import Message

log = logging.getLogger(__name__)

VERIFY_AGAIN_S = 1.0


class Restorable:
    """The checkpoints that services may have been told to continue from."""

    def __init__(
        self,
        folder: CheckpointFolder,
        registry: Registry,
        expected: Sequence[str],
        run: RunState,
        found: Found | None,
        complain: Callable[[str], None],
    ) -> None:
        """Start with what the run continues from.

        Args:
            folder: of all checkpoints.
            registry: knows what the services must agree on.
            expected: services that a checkpoint must have, unless it is a partial one.
            run: the run's state.
            found: the checkpoint that the run continues from, until there is a newer one.
            complain: called with what is wrong, for operators.
        """
        self._folder, self._registry, self._expected, self._run = folder, registry, expected, run
        self._complain = complain
        self.newest = found
        self._before: Found | None = None  # a service that joined before the last save may still be fetching it
        self._begun_behind = -1 if found else folder.last_number()  # this run does not continue from these
        self._damaged: set[str] = set()
        self._last_parts = self._find_parts()
        self._doubted: Found | None = None  # the checkpoint being verified
        self._verdict: str | None = None  # what is wrong with it; empty: nothing

    @property
    def name(self) -> str:
        """Name of the newest checkpoint; empty if there is none."""
        return self.newest.manifest.name if self.newest else ""

    def in_use(self, members: Collection[str]) -> set[str]:
        """Return the names of checkpoints that these services, or any, may continue from."""
        fetched_from = {self._last_parts[member].manifest.name for member in members if member in self._last_parts}
        return {self.name, Path(self._run.restored_from or "").name, *fetched_from}

    def saved(self, manifest: Manifest) -> None:
        """Note a new checkpoint."""
        self._before, self.newest = self.newest, Found(self._folder, manifest)
        self._last_parts |= dict.fromkeys(manifest.services, self.newest)
        self._damaged.discard(manifest.name)

    def for_member(self, member: Member) -> dict[str, Any]:
        """Return what a joining service is told about its earlier state; empty = it starts afresh.

        Saves do not wait for a body that is away and that the configuration does not name: it continues from the last
        one that it was part of.
        """
        found = self._last_parts.get(member.name)
        files = found.manifest.files_of(member.name) if found else []
        if found is None or not files:
            return {}
        if found is not self.newest:
            if misfitting_values(found, self._registry.agreement):
                return {}
            log.info("%s continues from checkpoint %s: it was not part of later ones", member.name, found.manifest.name)
        return {"checkpoint": found.manifest.name, "files": files}

    def read(self, peer: bytes, message: Message) -> Outgoing:
        """Return a piece to a service that restores its part; one that asks for an outdated checkpoint joins again."""
        piece = Piece.of(message)
        found = self._given(piece.checkpoint)
        if found is None:
            return [(peer, answer("rejoin"))]
        sizes = {path: nbytes for path, nbytes, _ in found.manifest.files_of(message.sender)}
        if piece.path not in sizes:
            raise WireError(f"{message.sender!r:.80} asks for {piece.path!r:.80} of {piece.checkpoint!r:.80}")
        nbytes = sizes[piece.path]
        if piece.offset >= nbytes:
            raise WireError(
                f"{message.sender!r:.80} asks for byte {piece.offset} of {piece.path!r:.80}, which has {nbytes}"
            )
        try:
            content = found.folder.read(piece.checkpoint, piece.path, piece.offset, limits.STATE_CHUNK)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._lose(found, f"{error.filename}: {error.strerror}")
            return [(peer, answer("rejoin"))]
        except OSError as error:  # may be temporary: the service asks again
            self.doubt(piece.checkpoint, f"it cannot be read: {error}")
            return []
        if len(content) < min(limits.STATE_CHUNK, nbytes - piece.offset):
            self._lose(found, f"{piece.path} has been cut short")
            return [(peer, answer("rejoin"))]
        return [(peer, piece.answer(NAME, NAME, content))]

    def _given(self, name: str) -> Found | None:
        """Return the checkpoint of this name, if a service may have been told to continue from it."""
        given = (self.newest, self._before, *self._last_parts.values())
        return next((found for found in given if found and found.manifest.name == name), None)

    def doubt(self, name: str, why: str) -> None:
        """Verify a checkpoint in the background: it is damaged on the disk, or was damaged on its way."""
        found = self._given(name)
        if found and not self._doubted:
            self._doubted = found
            log.warning("checkpoint %s: %s: verifying it", name, why)
            threading.Thread(target=self._verify, args=(found,), name="verify", daemon=True).start()

    def _verify(self, found: Found) -> None:
        verdict = ""
        for _ in range(2):  # a temporary fault must not cost a checkpoint
            try:
                same = found.folder.verify(found.manifest.name).files == found.manifest.files
                verdict = "" if same else "it was replaced by another one"
            except Exception as error:  # a failing disk may raise anything
                verdict = str(error)
            if not verdict:
                break
            time.sleep(VERIFY_AGAIN_S)
        self._verdict = verdict

    def hear_verdict(self) -> None:
        """Take note of what a verification has found."""
        if self._doubted is None or self._verdict is None:
            return
        found, why = self._doubted, self._verdict
        self._doubted = self._verdict = None
        if why:
            self._lose(found, why)
        else:
            log.warning("checkpoint %s is intact: it was damaged on its way, or by the service", found.manifest.name)

    def _lose(self, lost: Found, why: str) -> None:
        """Note that a checkpoint is damaged or gone: services that join from now on get the next best one."""
        name = lost.manifest.name
        self._damaged.add(name)
        if self._before is lost:
            self._before = None
        if self.newest is lost:
            self.newest = self._next_best()
            instead = self.name or "nothing but the parameters"
            self._complain(f"checkpoint {name} cannot be restored ({why}): services that join continue from {instead}")
        self._last_parts = self._find_parts()

    def _next_best(self) -> Found | None:
        """Return this run's newest checkpoint that exists, fits, and has not turned out to be damaged."""
        before = [self._before] if self._before and self._before.manifest.name not in self._damaged else []
        candidates = itertools.chain(self._of_this_run(), before)
        return next((f for f in candidates if not misfits(f, self._registry.agreement, self._expected)), None)

    def _of_this_run(self) -> Iterator[Found]:
        """Yield this run's checkpoints that exist and have not turned out to be damaged, newest first."""
        behind = max(self._run.restored_behind, self._begun_behind)
        for manifest in self._folder.newest_complete(self._damaged):
            if manifest.number > behind or manifest.name == self._run.restored_from:
                yield Found(self._folder, manifest)

    def _find_parts(self) -> dict[str, Found]:
        """Return service → the newest checkpoint that it was part of."""
        parts: dict[str, Found] = {}
        if self.newest is None:
            return parts
        for found in (self.newest, *self._of_this_run(), *filter(None, [self._before])):
            for service in found.manifest.services:
                parts.setdefault(service, found)
        return parts
