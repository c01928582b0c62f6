"""What the system should be doing, and who has confirmed it. Pure: no sockets, and the time is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ami_controller.registry import Member
from ami_shared.gate import Desired

ACTIVE = ("running", "blind")


@dataclass
class Command:
    """An operator's command that is being carried out.

    Attributes:
        peer: routing id of the operator.
        took_s: service → seconds until it confirmed.
        waiting: services that have not confirmed yet.
        gone: services that vanished before they confirmed.
        told: what else the operator is told at the end.
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
        """Begin `pause`, `resume` or `shutdown`; repeating the current one is harmless."""
        if kind == "shutdown":
            self.desired = replace(self.desired, stopping=True, epoch=self.desired.epoch + 1)
        elif self.desired.paused != (kind == "pause"):
            self.desired = replace(self.desired, paused=kind == "pause", epoch=self.desired.epoch + 1)
        waiting = {member.name for member in members}
        begun = Command(kind, peer, request, self.desired.epoch, now, now + timeout_s, waiting)
        self._commands.append(begun)
        return begun

    def heard(self, member: Member, now: float) -> None:
        """Take a member's report into account for all pending commands."""
        for command in self._commands:
            if member.name in command.waiting and self._confirms(member, command):
                command.waiting.discard(member.name)
                command.took_s[member.name] = now - command.begun_at

    def left(self, name: str, now: float, orderly: bool) -> None:
        """Note that a member has left: no command waits for it any longer."""
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
        """Whether a command waits for a confirmation."""
        return bool(self._commands)

    def give_up(self, now: float) -> None:
        """End all pending commands now, confirmed or not."""
        for command in self._commands:
            command.deadline = now

    def take_finished(self, now: float) -> list[Command]:
        """Remove and return the commands that are confirmed by all, or have timed out."""
        finished = [command for command in self._commands if not command.waiting or now >= command.deadline]
        self._commands = [command for command in self._commands if command not in finished]
        return finished

    def system_state(self, members: Iterable[Member], expected: Iterable[str]) -> str:
        """Return starting, running, pausing, paused or stopping.

        A lost body may still be acting, cut off: unless it had confirmed the pause, the system is not paused.
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
