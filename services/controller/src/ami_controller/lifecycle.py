"""What the system should be doing, and who has confirmed it. Pure: takes values and a time, no sockets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ami_controller.registry import Member
from ami_shared.gate import Desired

ACTIVE = ("running", "blind")


@dataclass
class Command:
    """An operator's command on its way through the system.

    Attributes:
        peer: routing id of whoever gave it.
        took_s: seconds until each service confirmed.
        waiting: services that have not yet.
        gone: services that vanished before they did.
        told: what else the operator hears at the end.
    """

    kind: str
    peer: bytes
    request: int
    epoch: int
    begun_at: float
    deadline: float
    waiting: set[str]
    took_s: dict[str, float] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)


class Lifecycle:
    """The wish that every service hears, and the commands that wait for confirmation."""

    def __init__(self, paused: bool = False, epoch: int = 0) -> None:
        self.desired = Desired(paused=paused, epoch=epoch)
        self._was_complete = False
        self._commands: list[Command] = []

    def command(
        self, kind: str, peer: bytes, request: int, timeout_s: float, members: Iterable[Member], now: float
    ) -> Command:
        """Begin `pause`, `resume` or `shutdown`; repeating one that holds already is harmless."""
        if kind == "shutdown":
            self.desired = replace(self.desired, stopping=True, epoch=self.desired.epoch + 1)
        elif self.desired.paused != (kind == "pause"):
            self.desired = replace(self.desired, paused=kind == "pause", epoch=self.desired.epoch + 1)
        waiting = {member.name for member in members}
        begun = Command(kind, peer, request, self.desired.epoch, now, now + timeout_s, waiting)
        self._commands.append(begun)
        return begun

    def heard(self, member: Member, now: float) -> None:
        """Take a member's report into account for all commands under way."""
        for command in self._commands:
            if member.name in command.waiting and self._confirms(member, command):
                command.waiting.discard(member.name)
                command.took_s[member.name] = now - command.begun_at

    def left(self, name: str, now: float, orderly: bool) -> None:
        """A member has gone: nobody need wait for it."""
        for command in self._commands:
            if name in command.waiting:
                command.waiting.discard(name)
                if orderly and command.kind == "shutdown":
                    command.took_s[name] = now - command.begun_at
                else:
                    command.gone.append(name)

    @staticmethod
    def _confirms(member: Member, command: Command) -> bool:
        if member.epoch < command.epoch:
            return False
        return {"pause": member.state == "paused", "resume": member.state in ACTIVE}.get(command.kind, False)

    @property
    def under_way(self) -> bool:
        """Whether a command waits for somebody's confirmation."""
        return bool(self._commands)

    def give_up(self, now: float) -> None:
        """Let all commands under way end now, confirmed or not."""
        for command in self._commands:
            command.deadline = now

    def take_finished(self, now: float) -> list[Command]:
        """Remove and return the commands that everybody confirmed or whose time is up."""
        finished = [command for command in self._commands if not command.waiting or now >= command.deadline]
        self._commands = [command for command in self._commands if command not in finished]
        return finished

    def system_state(self, members: Iterable[Member], expected: Iterable[str]) -> str:
        """Return starting, running, pausing, paused or stopping.

        A body that is lost may act on, cut off: where it had not confirmed a pause, nobody can say that all is paused.
        """
        everybody = list(members)
        living = {member.name: member for member in everybody if not member.lost}
        if self.desired.stopping:
            return "stopping"
        complete = all(name in living for name in expected)
        if complete and all(member.state in ACTIVE for member in living.values()):
            self._was_complete = True
        if self.desired.paused:
            asked = [m for m in everybody if m.role == "body" or not m.lost]
            confirmed = all(m.state == "paused" and m.epoch >= self.desired.epoch for m in asked)
            return "paused" if confirmed and (complete or self._was_complete) else "pausing"
        return "running" if self._was_complete else "starting"
