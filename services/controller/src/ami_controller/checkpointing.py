"""When the system is saved, who is told the result, and what state a joining service gets back.

Saves are requested by operators, by the schedule, and by an orderly end; there is one at a time, and requests during a
save are answered with that one.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ami_controller.answers import NAME, Outgoing, answer
from ami_controller.checkpoint_files import CheckpointFolder, Draft, Found, Manifest
from ami_controller.registry import Member, Registry
from ami_controller.restoring import NOT_NAMES, misfits, misfitting_values
from ami_controller.saving import Part, Saved, Saving, Writer
from ami_controller.state import RunState
from ami_shared import limits
from ami_shared.checkpoints import DAMAGED, FORGET, GET_PART, OFFER, Piece
from ami_shared.errors import WireError
from ami_shared.names import NAME_RULE, is_name
from ami_shared.wire import Message

log = logging.getLogger(__name__)

RETRY_S = 10.0
VERIFY_AGAIN_S = 1.0


class Points(Protocol):
    """Where the cost of saving is recorded."""

    def put_points(self, service: str, points: Sequence[tuple[str, float, int, float]]) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """When to save unasked, in seconds; interval None = never."""

    interval_s: float | None
    first_after_s: float
    timeout_s: float


@dataclass(frozen=True)
class Wish:
    """A peer that waits for a save to end."""

    peer: bytes
    request: int


class Checkpointing:
    """The controller's side of checkpoints."""

    def __init__(
        self,
        folder: CheckpointFolder,
        writer: Writer,
        schedule: Schedule,
        registry: Registry,
        expected: Sequence[str],
        models_of: Mapping[str, Collection[str] | None],
        run: RunState,
        config_text: str,
        points: Points,
        restorable: Found | None,
        now: float,
    ) -> None:
        """Start with no save under way.

        Args:
            expected: services without which there is no whole system to save.
            models_of: trainer → the models that it may save; None or absent = any.
            config_text: the composed configuration without passwords: a checkpoint may be given away.
            restorable: what joining services continue from, until there is a newer checkpoint.
        """
        self._folder, self._writer, self._schedule = folder, writer, schedule
        self._registry, self.expected, self._run = registry, list(expected), run
        self._models_of = models_of
        self._config_text, self._points, self.restorable = config_text, points, restorable
        self._before: Found | None = None  # a service that joined before the last save may still be fetching it
        number = restorable.manifest.number if restorable else 0
        self._last_number = max(folder.last_number(), run.restored_behind, run.last_checkpoint, number)
        self._begun_behind = -1 if restorable else folder.last_number()  # this run does not continue from these
        self._damaged: set[str] = set()
        self._last_parts = self._find_parts()
        self._doubted: Found | None = None  # the checkpoint being verified
        self._verdict: str | None = None  # what is wrong with it; empty: nothing
        self._saving: Saving | None = None
        self._wishes: list[Wish] = []
        self._due_at = now + schedule.first_after_s if schedule.interval_s is not None else float("inf")
        self._retry_s = RETRY_S
        self.trouble: str | None = None
        self._made = 0

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._saving is not None

    @property
    def absent(self) -> list[str]:
        """Services that a checkpoint needs and that are absent."""
        living = {member.name for member in self._registry.living()}
        return [service for service in self.expected if service not in living]

    @property
    def newest(self) -> str:
        """Name of the checkpoint that joining services continue from; empty if there is none."""
        return self.restorable.manifest.name if self.restorable else ""

    def save(self, peer: bytes, message: Message, now: float) -> Outgoing:
        """Handle an operator's request for a save."""
        request, name = message.get("request", int), message.fields.get("name")
        if name is not None and not (isinstance(name, str) and is_name(name)):
            return [(peer, _failure(request, f"a checkpoint's name has {NAME_RULE}"))]
        if name in NOT_NAMES:
            return [(peer, _failure(request, f"{name} is reserved in checkpoint={name}: choose another name"))]
        if name is not None and (self._saving or name in self._folder.all_names()):
            other = f"{self._saving.name} is being saved now" if self._saving else f"there is a {name} already"
            return [(peer, _failure(request, f"{other}: wait for it, or choose another name"))]
        reason = self.begin(now, name)
        if reason:
            return [(peer, _failure(request, reason))]
        assert self._saving is not None
        self._wishes.append(Wish(peer, request))
        return [(peer, answer("accepted", {"request": request, "checkpoint": self._saving.name}))]

    def begin(self, now: float, name: str | None = None, timeout_s: float | None = None) -> str:
        """Begin a save, or join the one in progress; return why that is impossible, or an empty string."""
        if self._saving:
            return ""
        if absent := self.absent:
            return f"{', '.join(absent)} cannot be reached: a checkpoint needs the whole system"
        living = {member.name: member for member in self._registry.living()}
        members = {name: member for name, member in living.items() if member.saves}
        if not members:
            return f"none of {', '.join(living)} takes part in checkpoints"
        chosen = name or self._fresh_name(time.time())
        texts = [("config.yaml", self._config_text.encode())]
        within_s = timeout_s or self._schedule.timeout_s
        fetched_from = {self._last_parts[member].manifest.name for member in living if member in self._last_parts}
        kept = {self.newest, Path(self._run.restored_from or "").name, *fetched_from}
        manifest = partial(self._manifest, name is not None)
        self._saving = Saving(chosen, members, self._writer, texts, manifest, self._models_of, kept, now, within_s)
        log.info("saving checkpoint %s", chosen)
        return ""

    def _fresh_name(self, now: float) -> str:
        name = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
        taken = set(self._folder.all_names())
        candidates = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(2)))
        return next(candidate for candidate in candidates if candidate not in taken)

    def _manifest(self, named: bool, draft: Draft, parts: Mapping[str, Part]) -> Manifest:
        """Make the manifest. Called in the writer's thread, when all files are on the disk."""
        services = {
            name: {"role": part.role, "incarnation": part.incarnation, "files": sorted(part.done)}
            for name, part in parts.items()
        }
        about: dict[str, Any] = {"steps": {}, "updates": {}, "versions": {}, "frontiers": {}}
        about["left_out"] = [service for service in self.expected if service not in parts]
        about["named"] = named
        for name, part in parts.items():
            if part.role == "body":
                about["steps"][name] = _number(draft.read_json(f"interaction/{name}/loop.json").get("steps"))
                continue
            told = draft.read_json(f"trainers/{name}.json")
            about["updates"][name] = _number(_map(told.get("training")).get("updates"))
            versions = {m: v for m, v in _map(told.get("versions")).items() if f"models/{m}.json" in part.done}
            about["versions"] |= {model: v for model, v in versions.items() if _number(v) is not None}
            about["frontiers"][name] = {
                body: [stream.get("incarnation"), _number(stream.get("frontier"))]
                for body, stream in _map(told.get("intake")).items()
                if isinstance(stream, dict)
            }
        agreement, run = self._registry.agreement, self._run.to_fields()
        self._last_number = 1 + max(self._folder.last_number(), self._last_number)
        return Manifest(draft.name, time.time(), agreement, services, draft.described, about, run, self._last_number)

    def heard(self, peer: bytes, message: Message, now: float) -> Outgoing:
        """Handle a service's offer, part, refusal, or request for a piece of a file. Raises WireError."""
        if message.kind == GET_PART:
            return self._read(peer, message)
        member = self._registry.members.get(message.sender)
        if member is None or member.routing_id != peer:
            return self.passed(now)
        if message.kind == DAMAGED:
            self._doubt(message.get("checkpoint", str), f"{member.name} received other content than was saved")
            return [(peer, answer("rejoin"))]
        if message.kind == OFFER and not (self._saving and self._saving.cut_id == message.get("checkpoint", str)):
            return [(peer, answer(FORGET, {"checkpoint": message.get("checkpoint", str)})), *self.passed(now)]
        if self._saving:
            {"offer": self._saving.offered, "unsaved": self._saving.refused, "part": self._saving.came}[message.kind](
                message, now
            )
        return self.passed(now)

    def _read(self, peer: bytes, message: Message) -> Outgoing:
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
            self._doubt(piece.checkpoint, f"it cannot be read: {error}")
            return []
        if len(content) < min(limits.STATE_CHUNK, nbytes - piece.offset):
            self._lose(found, f"{piece.path} has been cut short")
            return [(peer, answer("rejoin"))]
        return [(peer, piece.answer(NAME, NAME, content))]

    def _given(self, name: str) -> Found | None:
        """Return the checkpoint of this name, if a service may have been told to continue from it."""
        given = (self.restorable, self._before, *self._last_parts.values())
        return next((found for found in given if found and found.manifest.name == name), None)

    def _doubt(self, name: str, why: str) -> None:
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

    def _hear_verdict(self) -> None:
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
        if self.restorable is lost:
            self.restorable = self._next_best()
            instead = self.newest or "nothing but the parameters"
            self._complain(f"checkpoint {name} cannot be restored ({why}): services that join continue from {instead}")
        self._last_parts = self._find_parts()

    def _next_best(self) -> Found | None:
        """Return this run's newest checkpoint that exists, fits, and has not turned out to be damaged."""
        before = [self._before] if self._before and self._before.manifest.name not in self._damaged else []
        candidates = itertools.chain(self._of_this_run(), before)
        return next((f for f in candidates if not misfits(f, self._registry.agreement, self.expected)), None)

    def _of_this_run(self) -> Iterator[Found]:
        """Yield this run's checkpoints that exist and have not turned out to be damaged, newest first."""
        behind = max(self._run.restored_behind, self._begun_behind)
        for manifest in self._folder.newest_complete(self._damaged):
            if manifest.number > behind or manifest.name == self._run.restored_from:
                yield Found(self._folder, manifest)

    def _find_parts(self) -> dict[str, Found]:
        """Return service → the newest checkpoint that it was part of."""
        parts: dict[str, Found] = {}
        if self.restorable is None:
            return parts
        for found in (self.restorable, *self._of_this_run(), *filter(None, [self._before])):
            for service in found.manifest.services:
                parts.setdefault(service, found)
        return parts

    def gone(self, name: str, now: float) -> None:
        """Note that a service has vanished."""
        if self._saving:
            self._saving.gone(name, now)

    def passed(self, now: float) -> Outgoing:
        """Begin what is due, and report what has ended."""
        self._hear_verdict()
        if not self._saving and now >= self._due_at:
            reason = self.begin(now)
            if reason:
                self._due_at = now + RETRY_S
                self._complain(f"nothing is saved: {reason}")
        if not self._saving:
            return []
        for name, part in self._saving.parts.items():
            member = self._registry.members.get(name)
            if member is None or member.lost or member.incarnation != part.incarnation:
                self._saving.gone(name, now)
        answers = [
            (self._registry.members[name].routing_id, answer(kind, fields))
            for name, kind, fields in self._saving.passed(now)
            if name in self._registry.members
        ]
        return answers + (self._end(self._saving, self._saving.ended, now) if self._saving.ended else [])

    def _end(self, saving: Saving, saved: Saved, now: float) -> Outgoing:
        self._saving = None
        if (interval_s := self._schedule.interval_s) is not None:
            again_s = interval_s if saved.manifest else min(self._retry_s, interval_s)
            self._due_at = now + again_s
            # Each attempt costs all services a copy of their state.
            self._retry_s = RETRY_S if saved.manifest else 2 * again_s
        wishes, self._wishes = self._wishes, []
        if saved.manifest:
            self._before, self.restorable = self.restorable, Found(self._folder, saved.manifest)
            self._run.last_checkpoint = saved.manifest.number
            self._last_parts |= dict.fromkeys(saved.manifest.services, self.restorable)
            self.trouble = None
            self._damaged.discard(saved.name)
            self._made += 1
            nbytes = saved.manifest.nbytes
            log.info("checkpoint %s: %.1f MB in %.1f s", saved.name, nbytes / 1e6, saved.took_s)
            cost = [("checkpoint_s", saved.took_s), ("checkpoint_mb", nbytes / 1e6)]
            when = time.time()
            self._points.put_points("controller", [(name, value, int(when), when) for name, value in cost])
            told = {"ok": True, "checkpoint": saved.name, "bytes": nbytes, "took_s": saved.took_s}
            told["path"] = str((self._folder.directory / saved.name).resolve())
        else:
            self._complain(f"checkpoint {saved.name} was abandoned: {saved.reason}")
            told = {"ok": False, "checkpoint": saved.name, "reason": saved.reason}
        answers: Outgoing = [(wish.peer, answer("result", {"request": wish.request, **told})) for wish in wishes]
        living = [member for member in self._registry.living() if member.name in saving.parts]
        return answers + [(member.routing_id, answer(FORGET, {"checkpoint": saving.cut_id})) for member in living]

    def _complain(self, trouble: str) -> None:
        if trouble != self.trouble:
            log.error("%s", trouble)
        self.trouble = trouble

    def for_member(self, member: Member) -> dict[str, Any]:
        """Return what a joining service is told about its earlier state; empty = it starts afresh.

        Saves do not wait for a body that is away and that the configuration does not name: it continues from the last
        one that it was part of.
        """
        found = self._last_parts.get(member.name)
        files = found.manifest.files_of(member.name) if found else []
        if found is None or not files:
            return {}
        if found is not self.restorable:
            if misfitting_values(found, self._registry.agreement):
                return {}
            log.info("%s continues from checkpoint %s: it was not part of later ones", member.name, found.manifest.name)
        return {"checkpoint": found.manifest.name, "files": files}

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of checkpoints."""
        newest = self.restorable.manifest if self.restorable else None
        return {
            "newest": newest.name if newest else None,
            "age_s": max(0.0, time.time() - newest.created) if newest else None,
            "bytes": newest.nbytes if newest else None,
            "made": self._made,
            "saving": self._saving.statistics() if self._saving else None,
            "trouble": self.trouble,
        }


def _map(value: Any) -> dict[str, Any]:
    """Return a service's value if it is a map, else an empty one: services may be written in any language."""
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < limits.MAX_NUMBER else None


def _failure(request: int, reason: str) -> Message:
    return answer("result", {"request": request, "ok": False, "reason": reason})
