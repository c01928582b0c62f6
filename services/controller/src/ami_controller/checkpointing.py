"""When the system is saved, and who is told the result.

Saves are requested by operators, by the schedule, and by an orderly end; there is one at a time, and requests during a
save are answered with that one.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ami_controller.answers import Outgoing, answer
from ami_controller.checkpoint_files import CheckpointFolder, Draft, Found, Manifest
from ami_controller.registry import Registry
from ami_controller.restorable import Restorable
from ami_controller.restoring import NOT_NAMES, described_models
from ami_controller.saving import Part, Saved, Saving, Writer
from ami_controller.state import RunState
from ami_shared import limits
from ami_shared.checkpoints import DAMAGED, FORGET, GET_PART, OFFER
from ami_shared.names import NAME_RULE, is_name
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

log = logging.getLogger(__name__)

RETRY_S = 10.0


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
        models: Callable[[], Sequence[Snapshot]],
        run: RunState,
        config_text: str,
        points: Points,
        found: Found | None,
        now: float,
    ) -> None:
        """Start with no save under way.

        Args:
            expected: services without which there is no whole system to save.
            models_of: trainer → the models that it may save; None or absent = any.
            models: returns the newest parameters of all models, also of those whose trainers are absent.
            config_text: the composed configuration without passwords: a checkpoint may be given away.
            found: the checkpoint that the run continues from, until there is a newer one.
        """
        self._folder, self._writer, self._schedule = folder, writer, schedule
        self._registry, self.expected, self._run = registry, list(expected), run
        self._models_of, self._models = models_of, models
        self._config_text, self._points = config_text, points
        self.restorable = Restorable(folder, registry, self.expected, run, found, self._complain)
        number = found.manifest.number if found else 0
        self._last_number = max(folder.last_number(), run.restored_behind, run.last_checkpoint, number)
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
        kept, manifest = self.restorable.in_use(living), partial(self._manifest, name is not None)
        self._saving = Saving(
            chosen,
            members,
            self._writer,
            texts,
            self._described,
            manifest,
            self._models_of,
            kept,
            now,
            within_s,
        )
        log.info("saving checkpoint %s", chosen)
        return ""

    def _described(self) -> list[Snapshot]:
        """Return the newest parameters of all models that the configuration describes: others may fit nothing."""
        described = described_models(self._registry.agreement)
        return [snapshot for snapshot in self._models() if snapshot.model in described]

    def _fresh_name(self, now: float) -> str:
        name = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
        taken = set(self._folder.all_names())
        candidates = itertools.chain([name], (f"{name}.{n}" for n in itertools.count(2)))
        return next(candidate for candidate in candidates if candidate not in taken)

    def _manifest(self, named: bool, draft: Draft, parts: Mapping[str, Part], unoffered: Mapping[str, int]) -> Manifest:
        """Make the manifest. Called in the writer's thread, when all files are on the disk."""
        services = {
            name: {"role": part.role, "incarnation": part.incarnation, "files": sorted(part.done)}
            for name, part in parts.items()
        }
        about: dict[str, Any] = {"steps": {}, "updates": {}, "versions": dict(unoffered), "frontiers": {}}
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
            return self.restorable.read(peer, message)
        member = self._registry.members.get(message.sender)
        if member is None or member.routing_id != peer:
            return self.passed(now)
        if message.kind == DAMAGED:
            self.restorable.doubt(
                message.get("checkpoint", str), f"{member.name} received other content than was saved"
            )
            return [(peer, answer("rejoin"))]
        if message.kind == OFFER and not (self._saving and self._saving.cut_id == message.get("checkpoint", str)):
            return [(peer, answer(FORGET, {"checkpoint": message.get("checkpoint", str)})), *self.passed(now)]
        if self._saving:
            {"offer": self._saving.offered, "unsaved": self._saving.refused, "part": self._saving.came}[message.kind](
                message, now
            )
        return self.passed(now)

    def gone(self, name: str, now: float) -> None:
        """Note that a service has vanished."""
        if self._saving:
            self._saving.gone(name, now)

    def passed(self, now: float) -> Outgoing:
        """Begin what is due, and report what has ended."""
        self.restorable.hear_verdict()
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
            self.restorable.saved(saved.manifest)
            self._run.last_checkpoint = saved.manifest.number
            self.trouble = None
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

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of checkpoints."""
        newest = self.restorable.newest.manifest if self.restorable.newest else None
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
