"""The capture thread: opens a source, keeps its newest frame, detects loss and freezing, and reopens it.

The interaction loop only calls `newest()`; a driver that blocks affects only this thread.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ami_shared.clock import Clock, SystemClock
from ami_shared.errors import AmiError, SensorLostError
from ami_shared.wire import Array

log = logging.getLogger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 5.0
TRIAL_S, LONGEST_DOUBT_S = 2.0, 600.0
UNOBSERVED_S = 10.0  # longer than the time between any two steps of a body
HANG_S = 60.0  # longer than any driver's own timeouts


class Source(Protocol):
    """An opened camera or stream."""

    def read(self) -> Array | None:
        """Block for the next frame, (h, w[, 3]) uint8; None when the source has ended."""
        ...

    def release(self) -> None:
        """Close it."""
        ...


@dataclass(frozen=True)
class Captured:
    """A frame, when it arrived (monotonic seconds), and the uninterrupted stretch that it belongs to."""

    frame: Array
    at: float
    stretch: int


class Capture(threading.Thread):
    """Keeps the newest frame of a source that may vanish and return."""

    def __init__(
        self,
        name: str,
        open_source: Callable[[], Source],
        freeze_after_s: float = 2.0,
        same_picture_after_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Prepare the thread; it captures once started.

        Args:
            name: of the source, in messages.
            open_source: opens it; raises SensorLostError if that fails.
            freeze_after_s: seconds without a new frame after which the source counts as lost.
            same_picture_after_s: seconds of identical pixels, while frames are read and the body may move, after which
                the source counts as frozen; None = never. A frozen source is trusted again from time to time: if
                nothing else moves, only the body's own movement distinguishes a frozen picture from a still scene.
            clock: tells the time.
        """
        super().__init__(name="capture", daemon=True)
        self.source_name = name
        self._open = open_source
        self._freeze_after_s = freeze_after_s
        self._same_after_s = same_picture_after_s
        self._clock = clock or SystemClock()
        self._ending = threading.Event()
        self._newest: Captured | None = None
        self._last_frame: Array | None = None
        self._looked_at = self._changed_at = self._clock.monotonic()
        self._believed_until = self._believed_again_at = self._doubt_s = 0.0
        self._stretch = 0
        self._lost_in_stretch = False
        self._told: set[str] = set()  # kinds of reasons since it was lost
        self._why = f"{name} has not delivered a frame yet"
        self._driver_answered_at = self._clock.monotonic()
        self.frames = 0
        self.losses = 0

    def newest(self) -> Captured:
        """Return the newest frame.

        Raises:
            SensorLostError: the source is lost or frozen; it is being reopened.
            AmiError: its driver hangs, which only a new process can end: within this one it still holds the device.
        """
        captured = self._newest
        looked_before_at, now = self._looked_at, self._clock.monotonic()
        self._looked_at = now
        if now - looked_before_at > UNOBSERVED_S:
            self._driver_answered_at = now  # this process itself may have been stopped
        if self.ident and now - self._driver_answered_at > HANG_S:
            raise AmiError(f"{self.source_name}: its driver has hung for {HANG_S:.0f} s; restart this service")
        if captured is None:
            raise SensorLostError(self._why)
        silent_s = now - captured.at
        if silent_s > self._freeze_after_s:
            self._lost_in_stretch = True
            raise SensorLostError(f"{self.source_name} has delivered no frame for {silent_s:.1f} s")
        return captured

    def close(self) -> None:
        """Ask the thread to end; if it hangs in a driver, it is abandoned."""
        self._ending.set()
        self.join(timeout=0.5)

    def run(self) -> None:
        retry_s = FIRST_RETRY_S
        while not self._ending.is_set():
            frames_before = self.frames
            try:
                self._capture_until_lost()
            except SensorLostError as error:
                self._lose(str(error))
            except Exception as error:  # whatever a driver raises
                self._lose(f"{self.source_name} broke: {type(error).__name__}: {error}")
            self._driver_answered_at = self._clock.monotonic()
            if self.frames > frames_before:
                retry_s = FIRST_RETRY_S
            if self._ending.wait(retry_s):
                return
            retry_s = min(2 * retry_s, LONGEST_RETRY_S)

    def _capture_until_lost(self) -> None:
        source = self._open()
        try:
            while not self._ending.is_set():
                frame = source.read()
                if frame is None:
                    raise SensorLostError(f"{self.source_name} stopped delivering frames")
                self._driver_answered_at = now = self._clock.monotonic()
                self._check_changes(frame, now)
                self._keep(frame, now)
        finally:
            source.release()

    def _check_changes(self, frame: Array, now: float) -> None:
        """Raise SensorLostError while the picture does not change, even across a reopening."""
        if self._same_after_s is None:
            return
        last = self._last_frame
        unobserved = now - self._looked_at > UNOBSERVED_S
        if last is None or unobserved or frame.shape != last.shape or (frame != last).any():
            self._last_frame, self._changed_at = frame, now
            self._believe(now, self._same_after_s, self._same_after_s)
        elif now > self._believed_again_at:
            self._believe(now, TRIAL_S, min(2.0 * self._doubt_s, LONGEST_DOUBT_S))
        elif now > self._believed_until:
            raise SensorLostError(f"{self.source_name} shows the same picture for {now - self._changed_at:.0f} s")

    def _believe(self, now: float, for_s: float, doubt_s: float) -> None:
        """Trust the picture for `for_s` seconds; if it does not change, distrust it for the next `doubt_s` seconds."""
        self._doubt_s, self._believed_until = doubt_s, now + for_s
        self._believed_again_at = self._believed_until + doubt_s

    def _keep(self, frame: Array, now: float) -> None:
        if self._lost_in_stretch:
            self._lost_in_stretch = False
            self._stretch += 1
        if self._newest is None and self.losses:
            log.info("%s delivers frames again", self.source_name)
        self._newest = Captured(frame, now, self._stretch)
        self.frames += 1

    def _lose(self, why: str) -> None:
        self._why = why
        if self._newest is not None or self.losses == 0:
            self._told.clear()
            self.losses += 1
        if (kind := re.sub(r"\d+", "", why)) not in self._told:
            self._told.add(kind)
            log.warning("camera lost: %s; trying again until it returns", why)
        self._lost_in_stretch = self._lost_in_stretch or self._newest is not None
        self._newest = None
