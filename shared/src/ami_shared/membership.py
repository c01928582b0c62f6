"""A service's membership in the system, as a state machine without sockets: join, heartbeats, join again.

    service → controller    join · heartbeat · leave
    controller → service    joined · refused · wish · rejoin

Everything is idempotent and level-triggered: the next heartbeat makes up for lost messages.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ami_shared import __version__, limits
from ami_shared.errors import DisplacedError, JoinRefusedError, TakenBackError, WireError
from ami_shared.gate import Condition, Desired
from ami_shared.hub_clock import HubClock
from ami_shared.wire import Message


@dataclass(frozen=True)
class Identity:
    """Who a service is.

    Attributes:
        incarnation: random id of this run of the process; sequence numbers count within it.
        routing_id: under which the hub reaches this run's control socket. Whoever knows it could take over the socket's
            messages, so only the hub is told.
        take_over: whether a running process that has this name must end.
        saves: whether the service takes part in checkpoints.
        agreement: flat map of configuration values that must be equal on all machines.
    """

    name: str
    role: str
    agreement: Mapping[str, Any] = field(default_factory=dict)
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    routing_id: bytes = field(default_factory=lambda: secrets.token_hex(16).encode(), repr=False)
    take_over: bool = False
    saves: bool = True

    def message(self, kind: str, fields: Mapping[str, Any] | None = None) -> Message:
        """Return a control message from this service."""
        return Message(kind, self.name, self.incarnation, fields or {})


class Membership:
    """Decides what to send to the controller and when, and what its answers mean."""

    def __init__(self, identity: Identity, on_wish: Callable[[Desired], None], clock: HubClock | None = None) -> None:
        """Start as a service that has not joined.

        Args:
            identity: who this service is.
            on_wish: called with the controller's wish.
            clock: is set by the controller's answers.
        """
        self._identity = identity
        self._clock = clock or HubClock()
        self._on_wish = on_wish
        self._next_send = 0.0
        self._conflict_since: float | None = None
        self.last_answer = float("-inf")
        self.joined = False
        self.refusal: JoinRefusedError | None = None
        self.versions: dict[str, int] = {}
        self.version_floors: dict[str, int] = {}
        self.checkpoint: dict[str, Any] = {}
        self._lineage: str | None = None

    def linked(self, now: float) -> bool:
        """Whether the controller has answered lately."""
        return self.joined and now - self.last_answer < limits.SERVICE_TIMEOUT

    def next_send(self) -> float:
        """When poll() has something to send again, by the monotonic clock."""
        return self._next_send

    def hurry(self) -> None:
        """Let the next heartbeat leave at once."""
        self._next_send = 0.0

    def poll(self, now: float, condition: Condition, statistics: Callable[[], Mapping[str, Any]]) -> Message | None:
        """Return the join or heartbeat that is due, or None."""
        if now < self._next_send:
            return None
        self._next_send = now + limits.SERVICE_HEARTBEAT
        if self.refusal:
            return None
        report = {"state": condition.state, "epoch": condition.epoch, "statistics": dict(statistics())}
        report["asked"] = self._clock.ask()
        if self.joined:
            return self._identity.message("heartbeat", report)
        about = {"role": self._identity.role, "host": self._identity.host, "pid": self._identity.pid}
        about |= {} if self._lineage is None else {"lineage": self._lineage}
        about |= {"take_over": True} if self._identity.take_over else {}
        about |= {"code": __version__, "agreement": dict(self._identity.agreement), "saves": self._identity.saves}
        return self._identity.message("join", about | report)

    def handle(self, message: Message, now: float) -> bool:
        """Handle a message from the controller; return whether it was about membership. Raises WireError."""
        match message.kind:
            case "joined" | "wish":
                self._heard(message, now)
                if message.kind == "joined":
                    self.checkpoint = message.fields.get("checkpoint") or {}
                    self._lineage = message.fields.get("lineage")
                self.joined = True
                self._conflict_since = None
            case "rejoin":
                self.joined = False
                self.hurry()
            case "refused":
                self._refused(message, now)
            case _:
                return False
        return True

    def _heard(self, message: Message, now: float) -> None:
        versions, floors = _versions(message, "versions"), _versions(message, "version_floors")
        desired = Desired.from_fields(message.get("desired", dict))
        self.versions, self.version_floors = versions, floors
        self.last_answer = now
        self._clock.heard(message.fields.get("asked"), message.fields.get("clock"))
        self._on_wish(desired)

    def _refused(self, message: Message, now: float) -> None:
        """Handle a refusal. A name conflict may be due to a predecessor that has just died: retry for a while."""
        if self._conflict_since is None:
            self._conflict_since = now
        waited_s = now - self._conflict_since
        if not message.get("retry", bool) or waited_s > limits.NAME_CONFLICT_PATIENCE:
            self.refuse(message.get("reason", str), message.fields.get("begin_anew") is True)

    def refuse(self, reason: str, begin_anew: bool = False) -> None:
        """Note that the system refuses this service, for `reason`.

        Args:
            reason: why, in one line.
            begin_anew: whether it would accept another process in its place.
        """
        kind = TakenBackError if begin_anew else DisplacedError if self.joined else JoinRefusedError
        self.joined, self.refusal = False, kind(reason)


def _versions(message: Message, name: str) -> dict[str, int]:
    versions = message.get(name, dict)
    if not all(isinstance(model, str) and type(version) is int for model, version in versions.items()):
        raise WireError(f"{message.kind}: {name} must map models to numbers")
    return versions
