"""A body, a trainer and their controller at a hundred records a second, with an auditor beside them."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from auditor import Auditor, Life
from footprint import taken_by
from processes import Process, System, poll_for

from ami_shared.state import from_files

INTERVAL_S = 0.01
FAST = ("experiment=noise", f"inference.interval={INTERVAL_S}")
BUFFER = 2_048
LONGEST_PAUSE_S = 1.0
NOTHING: dict[str, Any] = {"published": 0, **{key: {"image_vae": 0} for key in ("received", "lost", "behind")}}
MOST_MORE = {"memory, MB": 500.0, "threads": 4.0, "descriptors": 24.0, "shared memory": 16.0}  # 8 pieces are remembered


class Stalls:
    """Counts the grid points that a timer of this process misses because the machine is busy elsewhere."""

    def __init__(self) -> None:
        self.missed = self.most_at_once = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._ending.wait(max(0.0, due_s - time.monotonic())):
            late = max(0, int((time.monotonic() - due_s) / INTERVAL_S))
            self.missed += late
            self.most_at_once = max(self.most_at_once, late)
            due_s += INTERVAL_S * (late + 1)

    def close(self) -> None:
        self._ending.set()
        self._thread.join()


class Flowing:
    """The trainer's buffer holds as far back as it reaches; the auditor sees every record from each life's birth."""

    def __init__(self, system: System, *overrides: str, only: str = "image_vae") -> None:
        """Args:
        overrides: of one service alone.
        only: its name.
        """
        self.system = system
        self._overrides = {only: overrides}
        self.processes = {"controller": system.start("controller")}
        self.auditor = Auditor(system.overrides)
        self.start("image_vae")
        system.wait_for_state("image_vae", "running", 120)  # it hears the body from birth
        self.start("body")
        system.wait_running()
        poll_for(lambda: self.received > 50, what="records flow")
        self._took = {name: (process.pid, taken_by(process.pid)) for name, process in self.processes.items()}
        self._skipped, self._stalls = self._of_body("skipped_ticks"), Stalls()
        self.auditor.longest_pause_s = 0.0  # what it needed to begin

    def start(self, name: str) -> Process:
        """Start a service, in place of one that has ended."""
        self.processes[name] = self.system.start(name, *self._overrides.get(name, ()))
        return self.processes[name]

    def restart(self, name: str) -> Process:
        """kill -9 a service, start it again, and wait until it is a member."""
        self.processes[name].kill()
        started = self.start(name)
        if name != "controller":
            poll_for(lambda: self.system.service(name).get("pid") == started.pid, 40, f"{name} is back")
        self.system.wait_running()
        return started

    @property
    def controller(self) -> Process:
        return self.processes["controller"]

    @property
    def trainer(self) -> Process:
        return self.processes["image_vae"]

    @property
    def body(self) -> Process:
        return self.processes["body"]

    def _of_body(self, counter: str) -> int:
        return int(self.system.service("body").get(counter) or 0)

    def told(self, body: str = "body") -> dict[str, Any]:
        streams: list[dict[str, Any]] = self.system.status()["experience"]
        found = [stream for stream in streams if stream["body"] == body and "image_vae" in stream["received"]]
        return {**NOTHING, **found[0]} if found else NOTHING

    def of_guest(self, counter: str) -> int:
        return int(self.told("guest")[counter]["image_vae"])

    @property
    def lives(self) -> list[Life]:
        """What the auditor saw of the body's lives."""
        return [life for life in self.auditor.lives.values() if life.body == "body"]

    def runs_on(self, seconds: float) -> None:
        """Wait until records flow, and some time more."""
        before = self.published
        poll_for(lambda: self.published > before, what="records flow")
        time.sleep(seconds)

    @property
    def published(self) -> int:
        return int(self.told()["published"])

    @property
    def received(self) -> int:
        return int(self.told()["received"]["image_vae"])

    def settled(self, beyond: int) -> dict[str, Any]:
        """Wait until the trainer is past `beyond`, pause, and return the status when all that was published is told."""

        def reached(told: dict[str, Any]) -> int:
            return int(told["received"]["image_vae"] + told["lost"]["image_vae"])

        poll_for(lambda: reached(self.told()) > beyond, what="the trainer caught up")
        self.all_arrived()

        def all_told() -> dict[str, Any] | None:  # what the trainer told last may be older than what the body did
            told = self.told()
            return told if reached(told) == told["published"] else None

        told = poll_for(all_told, what="the trainer told of all that was published")
        assert told["published"] > beyond
        return told

    def all_arrived(self) -> dict[str, Any]:
        """Pause; return the status once everything is with trainer and auditor, who saw each record once, in order."""
        self.system.command("pause")

        def arrived() -> dict[str, Any] | None:
            told, lives = self.told(), self.lives
            here = told["received"]["image_vae"] and not told["behind"]["image_vae"] and not self.auditor.behind
            return told if here and told["published"] and told["published"] == lives[-1].end else None

        told = poll_for(arrived, what="everything arrived")
        assert told["overflowed"] == 0
        assert [life.first for life in self.lives] == [0] * len(self.lives)
        assert (self.auditor.out_of_order, self.auditor.unexplained) == (0, 0)
        return told

    def unharmed(self, skipped_below: int = 300, stopped_s: float = 0.0) -> None:
        """Whoever lives since the beginning has leaked nothing; the body has kept its grid, but while stopped."""
        for name, (pid, before) in self._took.items():
            if pid != self.processes[name].pid:
                continue
            now = taken_by(pid)
            grown = {what: now[what] - before[what] for what in before}
            assert all(grown[what] <= MOST_MORE[what] for what in before), (name, before, now)
        if self._took["body"][0] == self.body.pid:
            skipped = self._of_body("skipped_ticks") - self._skipped
            assert skipped - self._stalls.missed < skipped_below + stopped_s / INTERVAL_S, "acting did not wait"
            pause_s = self.auditor.longest_pause_s - self._stalls.most_at_once * INTERVAL_S
            assert pause_s < LONGEST_PAUSE_S + stopped_s, "nor did it once"

    def frames_in_buffer(self) -> int:
        """Save, and return how many frames the trainer's buffer holds; none of them is there twice."""
        self.system.command("save", "--wait")
        folder = max((self.system.run_dir / "checkpoints").glob("*/data/image_vae.*")).parent.parent
        files = {f"data/{path.name}": path.read_bytes() for path in (folder / "data").iterdir()}
        kept = from_files("data/image_vae", files)
        fresh = kept["fresh"][np.arange(kept["seen"] - kept["fresh_count"], kept["seen"]) % len(kept["fresh"])]
        frames = np.concatenate([kept["frames"], fresh])
        different = len(np.unique(frames.reshape(len(frames), -1), axis=0))
        assert different >= len(frames) / len(self.lives), "a new life may see the noise of the last one again"
        return len(frames)

    def close(self) -> None:
        self._stalls.close()
        self.auditor.close()
