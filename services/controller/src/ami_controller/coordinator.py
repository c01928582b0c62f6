"""What the controller answers to each message: a state machine over registry and lifecycle, without sockets.

from services    join · heartbeat · leave · metrics · picture · get_parameters · fetch
                 offer · unsaved · part · get_part · damaged
from operators   status · pause · resume · save · shutdown
from anyone      agreement · clock
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ami_controller.answers import Outgoing, answer
from ami_controller.checkpointing import Checkpointing
from ami_controller.lifecycle import Command, Lifecycle
from ami_controller.registry import Registry
from ami_shared import experience, limits
from ami_shared.checkpoints import DAMAGED, GET_PART, OFFER, PART, SAVE, UNSAVED
from ami_shared.errors import WireError
from ami_shared.wire import Array, Message

log = logging.getLogger(__name__)

COMMANDS = ("pause", "resume", "shutdown")
LONGEST_COMMAND_S = 600.0
SHUTDOWN_S = 120.0  # the default timeout of a shutdown
SHARE_FOR_SAVING = 0.8  # of that time
LEAST_TRY_S = 1.0  # for a save
RESTART_S = 20.0  # within which a service that died is usually back
NOBODY = b""  # is not answered
GIVEN_ONCE_IN_S = 1.0  # how often one peer gets a model's snapshot


class MetricsSink(Protocol):
    """Where metrics go."""

    def put_points(self, service: str, points: Sequence[tuple[str, float, int, float]]) -> None: ...

    def put_picture(self, service: str, name: str, step: int, pixels: Array) -> None: ...


class Snapshots(Protocol):
    """Where the newest parameters are kept."""

    def versions(self) -> dict[str, int]: ...

    def newer_than(self, model: str, version: int) -> Message | None: ...


@dataclass
class PutOff:
    """A shutdown that operators have requested, and that waits for a save.

    Attributes:
        saved_by: when it no longer waits for the save, because the least patient operator does not.
        whole_by: when it no longer waits for services that a save needs and that may be about to return.
        wishes: of each operator the peer, the request, and until when it waits for the shutdown.
        tries: saves begun or joined for it.
        failed: why the first one failed.
    """

    saved_by: float
    whole_by: float
    wishes: list[tuple[bytes, int, float]]
    tries: int = 0
    failed: str = ""


class Coordinator:
    """Takes a peer's message and the time; returns the messages to send."""

    def __init__(
        self,
        registry: Registry,
        lifecycle: Lifecycle,
        snapshots: Snapshots,
        record: MetricsSink,
        checkpointing: Checkpointing,
        version_floors: dict[str, int],
        status: Callable[[float], dict[str, Any]],
        on_change: Callable[[], None],
        save_at_shutdown: bool = True,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Wire the parts that decide about messages.

        Args:
            version_floors: model → the largest version ever seen; updated here.
            status: returns the system's status at a monotonic time.
            on_change: called when something has changed that must survive the controller's death.
            save_at_shutdown: whether to save before a shutdown.
            wall: returns seconds since the epoch, by the clock that all services date by.
        """
        self._registry, self._lifecycle = registry, lifecycle
        self._snapshots, self._record, self._floors = snapshots, record, version_floors
        self._checkpointing = checkpointing
        self._status, self._on_change = status, on_change
        self._save_at_shutdown, self._wall = save_at_shutdown, wall
        self._put_off: PutOff | None = None
        self._given: dict[tuple[bytes, str], float] = {}
        self._handlers: Mapping[str, Callable[[bytes, Message, float], Outgoing]] = {
            "join": self._join,
            "heartbeat": self._heartbeat,
            "leave": self._leave,
            "metrics": self._metrics,
            "picture": self._picture,
            "get_parameters": self._get_parameters,
            experience.FETCH: self._pass_fetch_on,
            **dict.fromkeys((OFFER, UNSAVED, PART, GET_PART, DAMAGED), checkpointing.heard),
            SAVE: self._save,
            "clock": self._tell_clock,
            "status": self._tell_status,
            "agreement": self._tell_agreement,
            **dict.fromkeys(COMMANDS, self._command),
        }

    def handle(self, peer: bytes, message: Message, now: float) -> Outgoing:
        """Handle one message; raise WireError if it is not one that a peer may send."""
        handler = self._handlers.get(message.kind)
        if handler is None:
            raise WireError(f"unknown message type {message.kind!r:.40}")
        return handler(peer, message, now) + self._finish_commands(now)

    def passed(self, now: float) -> Outgoing:
        """Do what is due: let members expire and commands time out, and note new versions."""
        for member in self._registry.expire(now):
            log.warning("%s on %s is lost: silent for too long", member.name, member.host)
            self._lifecycle.left(member.name, now, orderly=False)
        for member in self._registry.forget(now, but=self._checkpointing.expected):
            log.warning("%s on %s, lost for %.0f s, is forgotten", member.name, member.host, limits.BODY_IS_GONE)
        self._note_versions()
        return self._checkpointing.passed(now) + self._end_after_save(now) + self._finish_commands(now)

    def revoked(self, name: str, now: float) -> Outgoing:
        """Tell a service that its key was revoked, and remove it from the members."""
        member = self._registry.members.get(name)
        if member is None or member.lost:
            return []
        del self._registry.members[name]
        self._lifecycle.left(name, now, orderly=False)
        told = {"reason": f"the key of {name} was revoked: see `ami keys list`", "retry": False}
        return [(member.routing_id, answer("refused", told))]

    def unreachable(self, peer: bytes, now: float) -> None:
        """Note that a peer's socket is gone."""
        if member := self._registry.lose(peer):
            ending = self._lifecycle.desired.stopping
            if not ending:
                log.warning("%s on %s is lost: its connection is gone", member.name, member.host)
            self._lifecycle.left(member.name, now, orderly=ending and member.state == "stopping")

    def _join(self, peer: bytes, message: Message, now: float) -> Outgoing:
        if peer.startswith(b"\0"):  # chosen by the hub's socket, and different after every reconnection
            raise WireError(f"join of {message.sender!r:.40} from a socket without a routing id")
        refusal = self._registry.join(message, peer, now)
        if refusal is None:
            member = self._registry.members[message.sender]
            log.info("%s joined: %s on %s, process %d", member.name, member.role, member.host, member.pid)
            self._lifecycle.heard(member, now)
            more = {"checkpoint": self._checkpointing.restorable.for_member(member), "lineage": self._registry.lineage}
            return [(peer, self._wish("joined", more | self._told_time(message)))]
        told = {"reason": refusal.reason, "retry": refusal.retry, "begin_anew": refusal.begin_anew}
        refused = answer("refused", told)
        if not refusal.retry:
            log.warning("refused: %s", refusal.reason)
            return [(peer, refused)]
        # A message to the holder of the name reveals whether it is still there.
        return [(peer, refused), (self._registry.members[message.sender].routing_id, self._wish("wish"))]

    def _heartbeat(self, peer: bytes, message: Message, now: float) -> Outgoing:
        was_lost = message.sender in self._registry.members and self._registry.members[message.sender].lost
        member = self._registry.heartbeat(message, now)
        if member is None:
            if self._registry.superseded(message):
                reason = f"the name {message.sender!r} was taken over by another process"
                return [(peer, answer("refused", {"reason": reason, "retry": False}))]
            return [(peer, answer("rejoin"))]
        if was_lost:
            log.info("%s is back", member.name)
        self._lifecycle.heard(member, now)
        return [(peer, self._wish("wish", self._told_time(message)))]

    def _told_time(self, message: Message) -> dict[str, Any]:
        """Return the controller's time if the service asked for it: services date what they send by this clock."""
        return {"asked": message.fields["asked"], "clock": self._wall()} if "asked" in message.fields else {}

    def _leave(self, peer: bytes, message: Message, now: float) -> Outgoing:
        if member := self._registry.leave(message, now):
            log.info("%s left", member.name)
            self._lifecycle.left(member.name, now, orderly=True)
        return []

    def _metrics(self, peer: bytes, message: Message, now: float) -> Outgoing:
        points = []
        for point in message.get("points", list):
            match point:
                case [str(name), float() | int() as value, int(step), float() | int() as time_s] if (
                    0 <= step < limits.MAX_NUMBER and 0 <= time_s < 1e12
                ):
                    points.append((name, float(value), step, float(time_s)))
                case _:
                    raise WireError("metrics: a point is not [name, value, step, time]")
        if message.sender in self._registry.members:
            self._record.put_points(message.sender, points)
        return []

    def _picture(self, peer: bytes, message: Message, now: float) -> Outgoing:
        pixels = message.arrays.get("pixels")
        if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype.name != "uint8":
            raise WireError("picture: pixels must be uint8 of shape (H, W, 3)")
        if pixels.size == 0:
            raise WireError("picture: no pixels")
        if message.sender in self._registry.members:
            self._record.put_picture(message.sender, message.get("name", str), message.get("step", int), pixels)
        return []

    def _get_parameters(self, peer: bytes, message: Message, now: float) -> Outgoing:
        model, version = message.get("model", str), message.get("newer_than", int)
        self._given = {asked: at for asked, at in self._given.items() if now - at < GIVEN_ONCE_IN_S}
        if (peer, model) in self._given or len(self._given) >= limits.MOST_MEMBERS * limits.MOST_MODELS:
            return []  # each snapshot waits in memory until the peer has read it
        newest = self._snapshots.newer_than(model, version)
        if newest is None:
            return []
        self._given[peer, model] = now
        return [(peer, newest)]

    def _pass_fetch_on(self, peer: bytes, message: Message, now: float) -> Outgoing:
        """Pass a trainer's request for records to the body that retains them; it answers on the experience stream."""
        body = self._registry.members.get(experience.Fetch.from_message(message).body)
        return [(body.routing_id, message)] if body and not body.lost else []

    def _tell_status(self, peer: bytes, message: Message, now: float) -> Outgoing:
        told = {"request": message.get("request", int), "ok": True, "status": self._status(now)}
        return [(peer, answer("result", told))]

    def _tell_agreement(self, peer: bytes, message: Message, now: float) -> Outgoing:
        """Return the agreement to a peer that does not read the configuration, and sends it with its join."""
        told = {"request": message.get("request", int), "ok": True, "agreement": self._registry.agreement}
        return [(peer, answer("result", told))]

    def _tell_clock(self, peer: bytes, message: Message, now: float) -> Outgoing:
        """Return the time to an operator: a command is dated by this clock, and not executed much later."""
        return [(peer, answer("result", {"request": message.get("request", int), "ok": True, "clock": now}))]

    @staticmethod
    def _stale(message: Message, now: float) -> bool:
        """Return whether a command was under way for so long that its sender no longer waits for it."""
        if "given" not in message.fields or now - message.get("given", float) <= limits.STALE_COMMAND:
            return False
        log.warning("%s was given %.0f s ago: not executed", message.kind, now - message.get("given", float))
        return True

    def _save(self, peer: bytes, message: Message, now: float) -> Outgoing:
        return [] if self._stale(message, now) else self._checkpointing.save(peer, message, now)

    def _command(self, peer: bytes, message: Message, now: float) -> Outgoing:
        request, timeout_s = message.get("request", int), message.get("timeout_s", float)
        if not 0 < timeout_s <= LONGEST_COMMAND_S:
            raise WireError(f"{message.kind}: timeout_s must be above 0 and at most {LONGEST_COMMAND_S:g}")
        if self._stale(message, now):
            return []
        accepted = (peer, answer("accepted", {"request": request}))
        if message.kind == "shutdown":
            return [accepted, *self._begin_shutdown(peer, request, timeout_s, now)]
        return [accepted, *self._begin_command(message.kind, peer, request, timeout_s, now)]

    def shut_down(self, now: float) -> Outgoing:
        """Begin what `ami shutdown` begins, without an operator who waits for it."""
        return [] if self._lifecycle.desired.stopping else self._begin_shutdown(NOBODY, 0, SHUTDOWN_S, now)

    def _begin_shutdown(self, peer: bytes, request: int, timeout_s: float, now: float) -> Outgoing:
        """Begin a shutdown, after a save unless it has begun already or none is wanted."""
        if self._lifecycle.desired.stopping or not self._save_at_shutdown:
            return self._begin_command("shutdown", peer, request, timeout_s, now)
        saved_by = now + SHARE_FOR_SAVING * timeout_s
        if self._put_off is None:
            self._put_off = PutOff(saved_by, now + RESTART_S, [])
        self._put_off.saved_by = min(saved_by, self._put_off.saved_by)
        self._put_off.wishes.append((peer, request, now + timeout_s))
        return self._end_after_save(now)

    def _begin_command(
        self, kind: str, peer: bytes, request: int, timeout_s: float, now: float, **told: str
    ) -> Outgoing:
        """Begin a command for all members; the operator is answered when it ends."""
        living = self._registry.living()
        before = self._lifecycle.desired
        lost = [member.name for member in self._registry.members.values() if member.lost]
        command = self._lifecycle.command(kind, peer, request, timeout_s, living, now)
        command.gone.extend(lost)
        command.told.update(told)
        if before != self._lifecycle.desired:
            log.info("%s asked for", kind)
            self._on_change()
        for member in living:
            self._lifecycle.heard(member, now)
        return [(member.routing_id, self._wish("wish")) for member in living]

    def _end_after_save(self, now: float) -> Outgoing:
        put_off = self._put_off
        if put_off is None:
            return []
        if self._checkpointing.busy and now < put_off.saved_by:
            put_off.tries = max(1, put_off.tries)
            return []
        trouble = "the save takes too long" if self._checkpointing.busy else self._save_for(put_off, now)
        if trouble is None:
            return []
        self._put_off = None
        if trouble:
            log.warning("ending without a save: %s", trouble)
        told = {"unsaved": trouble} if trouble else {"checkpoint": self._checkpointing.restorable.name}
        commands = (
            self._begin_command("shutdown", peer, request, max(0.0, done_by - now), now, **told)
            for peer, request, done_by in put_off.wishes
        )
        return [message for command in commands for message in command]

    def _save_for(self, put_off: PutOff, now: float) -> str | None:
        """Save before the shutdown; return what went wrong, empty if all is well, None while it is not done.

        A failed save is retried once; one that lacks a service is retried while that may return soon.
        """
        checkpointing, left_s = self._checkpointing, put_off.saved_by - now
        if put_off.tries:
            if not checkpointing.trouble:
                return ""
            put_off.failed = put_off.failed or checkpointing.trouble
            if put_off.tries > 1 or left_s < LEAST_TRY_S:
                return put_off.failed
        reason = checkpointing.begin(now, timeout_s=max(left_s, LEAST_TRY_S))
        put_off.tries += not reason
        may_return = now < put_off.whole_by and left_s > 0 and self._registry.awaits(checkpointing.absent, now)
        if not reason or may_return:
            return None
        return put_off.failed or reason

    def _finish_commands(self, now: float) -> Outgoing:
        told = [(c.peer, answer("result", self._outcome(c))) for c in self._lifecycle.take_finished(now)]
        return [(peer, result) for peer, result in told if peer != NOBODY]

    @staticmethod
    def _outcome(command: Command) -> dict[str, Any]:
        if command.waiting:
            log.warning("%s: no confirmation from %s", command.kind, ", ".join(sorted(command.waiting)))
        return {
            "request": command.request,
            "ok": not command.waiting and not command.gone,
            "took_s": command.took_s,
            "unconfirmed": sorted({*command.waiting, *command.gone}),
            "gone": command.gone,
            **command.told,
        }

    def _note_versions(self) -> None:
        newer = {m: v for m, v in self._snapshots.versions().items() if v > self._floors.get(m, 0)}
        if newer:
            self._floors.update(newer)
            self._on_change()

    def _wish(self, kind: str, more: Mapping[str, Any] | None = None) -> Message:
        fields = {
            "desired": self._lifecycle.desired.to_fields(),
            "versions": self._snapshots.versions(),
            "version_floors": dict(self._floors),
        }
        return answer(kind, fields | dict(more or {}))
