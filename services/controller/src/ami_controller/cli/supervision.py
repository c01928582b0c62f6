"""When a child process that ended is started again, and when everything ends. Pure: takes values and a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from ami_shared.errors import AmiError, ConfigurationError, DisplacedError

FIRST_DELAY_S, LONGEST_DELAY_S, HEALTHY_AFTER_S = 0.5, 10.0, 30.0
LEAVING_S = 600.0  # the longest that the end of a whole system takes
GOODBYE_S = 10.0  # the time that a service takes to say goodbye when it is told to end


@dataclass
class Child:
    """One service as the supervisor sees it."""

    name: str
    started_at: float = 0.0
    restart_at: float | None = None
    delay_s: float = FIRST_DELAY_S
    restarts: int = 0
    stays_down: bool = False  # it has ended, and is not started again


@dataclass(frozen=True)
class Verdict:
    """The consequence of a child's end: restart it after `delay_s`, end everything with `exit_code`, or nothing.

    Attributes:
        displaced: whether it stays down because another process has its place.
    """

    delay_s: float | None = None
    exit_code: int | None = None
    displaced: bool = False


@dataclass
class Supervision:
    """Decides for all children of one `ami up`.

    Attributes:
        whole: whether the system has ever run completely: then one part that can no longer run does not end the rest.
        left_at: when a service ended because the system ends; a controller that dies forgets that.
    """

    children: dict[str, Child] = field(default_factory=dict)
    ending: bool = False
    whole: bool = False
    left_at: float = float("-inf")

    def started(self, name: str, now: float) -> None:
        """Note that a child has been started."""
        child = self.children.setdefault(name, Child(name))
        child.started_at, child.restart_at, child.stays_down = now, None, False

    def ended(self, name: str, code: int, now: float) -> Verdict:
        """Decide on the consequence of a child's exit code (negative: killed by that signal)."""
        verdict = self._verdict(self.children[name], code, now)
        self.children[name].stays_down = verdict.delay_s is None
        return verdict

    def stays_down(self, name: str) -> bool:
        """Return whether a child has ended for good, or was never started."""
        child = self.children.get(name)
        return child is None or child.stays_down

    def _verdict(self, child: Child, code: int, now: float) -> Verdict:
        name = child.name
        if self.ending:
            return Verdict()
        if code == DisplacedError.exit_code:
            return Verdict(displaced=True)
        if code == ConfigurationError.exit_code and not self.whole:
            return Verdict(exit_code=code)
        if code == 0 and name != "controller":
            self.left_at = now
            return Verdict(exit_code=AmiError.exit_code if self._controller_died(now) else None)
        if name == "controller" and (code == 0 or now - self.left_at < LEAVING_S):
            return Verdict(exit_code=AmiError.exit_code if code else 0)
        if now - child.started_at > HEALTHY_AFTER_S:
            child.delay_s = FIRST_DELAY_S
        delay_s = child.delay_s
        child.delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        child.restart_at = now + delay_s
        child.restarts += 1
        return Verdict(delay_s=delay_s)

    def _controller_died(self, now: float) -> bool:
        """Return whether the controller that told a service to end is gone, or was until just now."""
        controller = self.children.get("controller")
        if controller is None or not controller.restarts:
            return False
        return controller.restart_at is not None or now - controller.started_at < GOODBYE_S

    def due(self, now: float) -> list[str]:
        """Return the children that are due to be restarted."""
        if self.ending:
            return []
        return [c.name for c in self.children.values() if c.restart_at is not None and now >= c.restart_at]
