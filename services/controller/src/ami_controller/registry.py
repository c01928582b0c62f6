"""Who is part of the system, and when they were last heard from. Pure: no sockets, and the time is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ami_shared import limits
from ami_shared.errors import WireError
from ami_shared.names import NAME_RULE, is_name
from ami_shared.wire import Message

BACK_SOON_S = 30.0  # a vanished service returns within this time of its last sign of life, if at all


@dataclass
class Member:
    """One service, as last reported by itself.

    Attributes:
        routing_id: of its control socket.
        state: the last state that it reported.
        saves: whether it can take part in checkpoints.
        lost: whether it has vanished without saying goodbye.
    """

    name: str
    role: str
    host: str
    pid: int
    incarnation: str
    routing_id: bytes
    heard_at: float
    state: str = "starting"
    epoch: int = -1
    statistics: Mapping[str, Any] = field(default_factory=dict)
    saves: bool = False
    lost: bool = False

    def take_report(self, message: Message) -> None:
        """Take over a join's or heartbeat's report; raise WireError if a field is missing."""
        state, epoch = message.get("state", str), message.get("epoch", int)
        self.statistics = message.get("statistics", dict)
        self.state, self.epoch, self.lost = state, epoch, False


@dataclass(frozen=True)
class Refusal:
    """Why a service may not join.

    Attributes:
        retry: whether it may succeed later.
        begin_anew: whether another process with the same configuration may join.
    """

    reason: str
    retry: bool = False
    begin_anew: bool = False


class Registry:
    """The members of the system, by name."""

    def __init__(self, agreement: Mapping[str, Any], lineage: str = "", begun_at: float = float("-inf")) -> None:
        """Start without members.

        Args:
            agreement: the values on which every member's configuration must agree, as a flat map.
            lineage: of the run; a service of another lineage holds state from which this run was taken back.
            begun_at: when this controller began, by the monotonic clock: members of its predecessor may return soon.
        """
        self._begun_at = begun_at
        self.agreement, self.lineage = dict(agreement), lineage
        self.members: dict[str, Member] = {}
        self._left_at: dict[str, float] = {}

    def join(self, message: Message, peer: bytes, now: float) -> Refusal | None:
        """Admit the sender of a join, with the socket `peer`, or return why not; WireError if a field is missing."""
        if not is_name(message.sender):
            raise WireError(f"join: a service's name has {NAME_RULE}")
        about = (message.get("role", str), message.get("host", str), message.get("pid", int))
        if message.fields.get("lineage", self.lineage) != self.lineage:
            reason = f"the run was taken back to a checkpoint: {message.sender} must restart from there"
            return Refusal(reason, begin_anew=True)
        differing = self._differences(message.sender, message.get("agreement", dict))
        if differing:
            return Refusal(f"{message.sender} has a different configuration than the controller: {differing}")
        known = self.members.get(message.sender)
        taking_over = message.fields.get("take_over") is True
        if known and known.incarnation != message.incarnation and not known.lost and not taking_over:
            return Refusal(
                f"the name {message.sender!r} is taken by process {known.pid} on {known.host}: "
                f"end that one, choose another name, or take it over (--take-over, with `ami up` take_over=true)",
                retry=True,
            )
        if not known and not self._make_room():
            return Refusal(f"no room for {message.sender}: there are {limits.MOST_MEMBERS} services already")
        role, host, pid = about
        member = Member(message.sender, role, host, pid, message.incarnation, peer, now)
        member.saves = message.fields.get("saves") is True
        member.take_report(message)
        self.members[message.sender] = member
        return None

    def _differences(self, name: str, theirs: Mapping[str, Any]) -> str:
        keys = sorted(set(self.agreement) | set(theirs), key=str)
        absent = object()
        differing = [key for key in keys if self.agreement.get(key, absent) != theirs.get(key, absent)]
        told = [
            f"{key!s:.80}: {theirs.get(key, 'absent')!s:.80} in {name}, "
            f"{self.agreement.get(key, 'absent')!s:.80} in the controller"
            for key in differing
        ]
        more = f" and {len(told) - 6} more" if len(told) > 6 else ""
        return "; ".join(told[:6]) + more

    def _make_room(self) -> bool:
        """Forget the member lost first if there are too many; return whether there is room for one more."""
        if len(self.members) < limits.MOST_MEMBERS:
            return True
        lost = [member for member in self.members.values() if member.lost]
        if lost:
            del self.members[min(lost, key=lambda member: member.heard_at).name]
        return bool(lost)

    def heartbeat(self, message: Message, now: float) -> Member | None:
        """Take a member's report; return the member, or None if the sender is not (or no longer) one."""
        member = self.members.get(message.sender)
        if member is None or member.incarnation != message.incarnation:
            return None
        member.take_report(message)
        member.heard_at = now
        return member

    def superseded(self, message: Message) -> bool:
        """Return whether the sender's name now belongs to another living process."""
        member = self.members.get(message.sender)
        return member is not None and member.incarnation != message.incarnation and not member.lost

    def leave(self, message: Message, now: float) -> Member | None:
        """Remove and return a member that says goodbye."""
        member = self.members.get(message.sender)
        if member is None or member.incarnation != message.incarnation:
            return None
        self._left_at[message.sender] = now
        return self.members.pop(message.sender)

    def lose(self, routing_id: bytes) -> Member | None:
        """Mark and return the member whose socket is gone."""
        for member in self.members.values():
            if member.routing_id == routing_id and not member.lost:
                member.lost = True
                return member
        return None

    def expire(self, now: float) -> list[Member]:
        """Mark and return the members that have been silent for too long."""
        silent = [
            member
            for member in self.members.values()
            if not member.lost and now - member.heard_at > limits.SERVICE_TIMEOUT
        ]
        for member in silent:
            member.lost = True
        return silent

    def awaits(self, names: Sequence[str], now: float) -> bool:
        """Return whether all of these may join soon: they vanished or left just now, or this controller is young."""
        gone_at = [self._left_at.get(name, self._begun_at) for name in names if name not in self.members]
        gone_at += [member.heard_at for name in names if (member := self.members.get(name))]
        return bool(gone_at) and now - min(gone_at) < BACK_SOON_S

    def forget(self, now: float, but: Sequence[str]) -> list[Member]:
        """Remove and return members that have been lost for too long to be waited for, except those in `but`."""
        gone = [
            member
            for member in self.members.values()
            if member.lost and member.name not in but and now - member.heard_at > limits.BODY_IS_GONE
        ]
        for member in gone:
            del self.members[member.name]
        self._left_at = {name: left for name, left in self._left_at.items() if now - left < BACK_SOON_S}
        return gone

    def living(self) -> list[Member]:
        """All members that are not lost."""
        return [member for member in self.members.values() if not member.lost]
