"""Saving: the state machine that has all services take one cut, collects their files, and has them written.

    begin ──save──► every service ──offer──► get_part ⇄ part, file by file ──► commit ──► saved
                        └── unsaved, gone, too slow, disk full: abandoned, with who and why

No sockets and no disk here: messages to send are returned, and data to write is given to the writer.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ami_controller.checkpoint_files import Draft, Manifest, is_safe
from ami_controller.checkpoint_writer import Abandon, Begin, Commit, Failed, Job, Write, Written
from ami_controller.registry import Member
from ami_shared import checkpoints, limits
from ami_shared.checkpoints import Cut, Piece, bytes_of, sizes_of
from ami_shared.errors import WireError
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

REPEAT_S = 1.0

Question = tuple[str, str, Mapping[str, Any]]  # service, kind of message, its fields


class Writer(Protocol):
    """What is needed here of the checkpoint writer."""

    def put(self, job: Job) -> None: ...

    def take_results(self) -> list[Written | Failed]: ...


@dataclass
class Part:
    """The progress of one service's part.

    Attributes:
        sizes: path → bytes, once offered.
        written: bytes on the disk.
        reading: the requested piece, and when it was requested.
        writing: whether the writer has a piece to write.
        done: paths of files on the disk.
    """

    role: str
    incarnation: str
    sizes: dict[str, int] | None = None
    written: int = 0
    reading: tuple[Piece, float] | None = None
    writing: bool = False
    done: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.sizes is not None and len(self.done) == len(self.sizes)


@dataclass(frozen=True)
class Saved:
    """How a save ended: with a checkpoint, or with a reason."""

    name: str
    took_s: float
    manifest: Manifest | None = None
    reason: str = ""


class Saving:
    """One save, from the request to the checkpoint."""

    def __init__(
        self,
        name: str,
        members: Mapping[str, Member],
        writer: Writer,
        texts: list[tuple[str, bytes]],
        models: Callable[[], Sequence[Snapshot]],
        manifest: Callable[[Draft, Mapping[str, Part], Mapping[str, int]], Manifest],
        models_of: Mapping[str, Collection[str] | None],
        kept: set[str],
        now: float,
        timeout_s: float,
    ) -> None:
        """Choose the cut; passed() returns the requests to the members.

        Args:
            name: of the checkpoint.
            members: the services that take part.
            writer: writes the checkpoint.
            texts: the controller's own files: path and content.
            models: returns the newest parameters of all models: those that nobody offers, because their trainer is not
                part of the system, are saved as well.
            manifest: makes the manifest once everything is written, from the draft, the parts, and the versions of the
                models that nobody offered.
            models_of: trainer → the models that it may save; None or absent = any.
            kept: names of checkpoints that stay, however old.
            now: monotonic time.
            timeout_s: seconds after which the save is abandoned.
        """
        self.name, self._writer, self._texts, self._manifest = name, writer, texts, manifest
        self._models, self._unoffered = models, dict[str, int]()
        self._models_of, self._kept = models_of, kept
        self.begun_at, self._deadline = now, now + timeout_s
        self.parts = {member.name: Part(member.role, member.incarnation) for member in members.values()}
        bodies = tuple(sorted(member.name for member in members.values() if member.role == "body"))
        self.cut_id = f"{name}/{secrets.token_hex(4)}"  # a name may be tried again, a cut is taken once
        self._cut = Cut(self.cut_id, bodies)
        self._asked_at: dict[str, float] = {}
        self._began = self._committing = False
        self.ended: Saved | None = None

    def offered(self, message: Message, now: float) -> None:
        """Handle a service's offer; raise WireError if it offers what it may not."""
        part = self._part(message)
        if part is None or part.sizes is not None:
            return
        sizes = sizes_of(message)
        if not sizes or not all(is_safe(path) and self._may(message.sender, part.role, path) for path in sizes):
            raise WireError(f"{message.sender} offers files that do not belong to it")
        for name, other in self.parts.items():
            if both := sorted(sizes.keys() & (other.sizes or {}).keys()):
                self.fail(f"{name} and {message.sender} both offer {', '.join(both):.200}: only one of them may", now)
                return
        part.sizes = sizes
        if not self._began and all(other.sizes is not None for other in self.parts.values()):
            self._began = True
            offered = {path for other in self.parts.values() for path in other.sizes or {}}
            models = [snapshot for snapshot in self._models() if f"models/{snapshot.model}.json" not in offered]
            self._unoffered = {snapshot.model: snapshot.version for snapshot in models}
            nbytes = self.nbytes + sum(array.nbytes for snapshot in models for array in snapshot.arrays.values())
            self._writer.put(Begin(self.cut_id, self.name, nbytes, self._texts, models, self._kept))

    def _may(self, service: str, role: str, path: str) -> bool:
        if role == "body":
            return path.startswith(f"interaction/{service}/")
        models = self._models_of.get(service)
        own = ("models/",) if models is None else tuple(f"models/{model}." for model in models)
        return path.startswith((f"trainers/{service}.", f"data/{service}.", *own))

    def refused(self, message: Message, now: float) -> None:
        """Handle a service's refusal to take part."""
        if self._part(message):
            self.fail(f"{message.sender}: {message.get('reason', str):.200}", now)

    def came(self, message: Message, now: float) -> None:
        """Handle a piece of a file. Raises WireError."""
        part, piece = self._part(message), Piece.of(message)
        if part is None or part.sizes is None or part.reading is None or part.reading[0] != piece:
            return
        content = bytes_of(message)
        end, size = piece.offset + len(content), part.sizes[piece.path]
        if end > size:
            raise WireError(f"{message.sender}: {piece.path} is longer than was offered")
        part.reading, part.writing = None, True
        self._writer.put(Write(self.cut_id, message.sender, piece.path, content, end == size))

    def _part(self, message: Message) -> Part | None:
        part = self.parts.get(message.sender)
        fits = part is not None and message.get("checkpoint", str) == self.cut_id and not self.ended
        return part if fits and part is not None and part.incarnation == message.incarnation else None

    def gone(self, name: str, now: float) -> None:
        """Note that a service has vanished: unless it has sent its whole part, the save fails."""
        if name in self.parts and not self.parts[name].complete:
            self.fail(f"{name} vanished before it had sent its part", now)

    def passed(self, now: float) -> list[Question]:
        """Do what is due; return the requests to send."""
        for result in self._writer.take_results():
            self._take(result, now)
        if self.ended:
            return []
        if now > self._deadline and not self._committing:  # while committing, the writer reports the result
            slow = ", ".join(self.waiting_for) or "the disk"
            self.fail(f"{slow} did not finish within {self._deadline - self.begun_at:.0f} s", now)
            return []
        questions = [question for name in self.parts for question in self._questions(name, now)]
        if self._began and not self._committing and all(part.complete for part in self.parts.values()):
            self._committing = True
            parts = dict(self.parts)
            self._writer.put(
                Commit(self.cut_id, lambda draft: self._manifest(draft, parts, self._unoffered), self._kept)
            )
        return questions

    def _questions(self, name: str, now: float) -> list[Question]:
        part = self.parts[name]
        if part.sizes is None:
            if now - self._asked_at.get(name, float("-inf")) < REPEAT_S:
                return []
            self._asked_at[name] = now
            return [(name, checkpoints.SAVE, {"cut": self._cut.to_list()})]
        if not self._began or part.complete or part.writing:
            return []
        if part.reading is None:
            path = next(path for path in part.sizes if path not in part.done)
            part.reading = (Piece(self.cut_id, path, 0), float("-inf"))
        piece, asked_at = part.reading
        if now - asked_at < limits.CHUNK_PATIENCE:
            return []
        part.reading = (piece, now)
        return [(name, checkpoints.GET_PART, piece.fields())]

    def _take(self, result: Written | Failed, now: float) -> None:
        if result.cut_id != self.cut_id or self.ended:
            return
        if isinstance(result, Failed):
            self.ended = Saved(self.name, now - self.begun_at, reason=result.reason)
        elif result.manifest:
            self.ended = Saved(self.name, now - self.begun_at, result.manifest)
        else:
            part = self.parts[result.service]
            part.written += result.nbytes
            part.writing = False
            if result.last:
                part.done.append(result.path)
            else:
                done = part.written - sum((part.sizes or {})[path] for path in part.done)
                part.reading = (Piece(self.cut_id, result.path, done), float("-inf"))

    def fail(self, reason: str, now: float) -> None:
        """Abandon the save."""
        if not self.ended:
            self._writer.put(Abandon(self.cut_id))
            self.ended = Saved(self.name, now - self.begun_at, reason=reason)

    @property
    def nbytes(self) -> int:
        """Size of all files offered so far."""
        return sum(sum(part.sizes.values()) for part in self.parts.values() if part.sizes)

    @property
    def waiting_for(self) -> list[str]:
        """Services that have not sent their whole part."""
        return [name for name, part in self.parts.items() if not part.complete]

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the save in progress."""
        return {
            "checkpoint": self.name,
            "bytes": sum(part.written for part in self.parts.values()),
            "of_bytes": self.nbytes,
            "services": {
                name: {"bytes": part.written, "of_bytes": sum(part.sizes.values()) if part.sizes else None}
                for name, part in self.parts.items()
            },
        }
