"""When a child process that ended is started again, and when everything ends. Pure: takes values and a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from ami_shared.errors import AmiError, ConfigurationError, DisplacedError

FIRST_DELAY_S, LONGEST_DELAY_S, HEALTHY_AFTER_S = 0.5, 10.0, 30.0


@dataclass
class Child:
    """One service as the supervisor sees it."""

    name: str
    started_at: float = 0.0
    restart_at: float | None = None
    delay_s: float = FIRST_DELAY_S
    restarts: int = 0


@dataclass(frozen=True)
class Verdict:
    """What follows from a child's end: start it again after `delay_s`, end everything with `exit_code`, or nothing.

    Attributes:
        displaced: whether it stays down because another has its place.
    """

    delay_s: float | None = None
    exit_code: int | None = None
    displaced: bool = False


@dataclass
class Supervision:
    """Decides for all children of one `ami up`.

    Attributes:
        whole: whether the system has ever run as a whole: then one part that cannot run any more does not end the rest.
        leaving: whether a service has ended because the system does, which a controller that dies does not remember.
    """

    children: dict[str, Child] = field(default_factory=dict)
    ending: bool = False
    whole: bool = False
    leaving: bool = False

    def started(self, name: str, now: float) -> None:
        """A child has been started."""
        child = self.children.setdefault(name, Child(name))
        child.started_at, child.restart_at = now, None

    def ended(self, name: str, code: int, now: float) -> Verdict:
        """Decide what follows from a child's exit code (negative: killed by that signal)."""
        child = self.children[name]
        if self.ending:
            return Verdict()
        if code == DisplacedError.exit_code:
            return Verdict(displaced=True)
        if code == ConfigurationError.exit_code and not self.whole:
            return Verdict(exit_code=code)
        if code == 0 and name != "controller":
            self.leaving = True
            return Verdict()
        if name == "controller" and (code == 0 or self.leaving):
            return Verdict(exit_code=AmiError.exit_code if code else 0)
        if now - child.started_at > HEALTHY_AFTER_S:
            child.delay_s = FIRST_DELAY_S
        delay_s = child.delay_s
        child.delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        child.restart_at = now + delay_s
        child.restarts += 1
        return Verdict(delay_s=delay_s)

    def due(self, now: float) -> list[str]:
        """Return the children whose time to be started again has come."""
        if self.ending:
            return []
        return [c.name for c in self.children.values() if c.restart_at is not None and now >= c.restart_at]
