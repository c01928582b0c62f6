"""The camera: an index (OBS virtual camera), a device path, a file or a URL, read by OpenCV."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2

from ami_inference.sensors.capture import Capture, Source
from ami_inference.sensors.frames import checked_size, to_observation
from ami_inference.sensors.sensor import Observation
from ami_shared.clock import Clock, SystemClock
from ami_shared.config_checks import is_finite_number
from ami_shared.errors import ConfigurationError, SensorLostError
from ami_shared.uris import without_passwords
from ami_shared.wire import Array

CAMERAS = cv2.CAP_DSHOW if os.name == "nt" else cv2.CAP_ANY  # OBS's virtual camera exists in DirectShow only
SLOW_FRAME_S = 3.0  # DirectShow takes no frame for a second as an end, with which a slow device begins
OPEN_TIMEOUT_MS, READ_TIMEOUT_MS = 3_000, 2_000


class OpenCVSource:
    """One opened cv2.VideoCapture."""

    def __init__(self, camera: int | str, requested: Mapping[int, float]) -> None:
        """Open the camera; raise SensorLostError if it cannot be opened."""
        self._capture = cv2.VideoCapture()
        if not _open(self._capture, camera):
            self._capture.release()
            if isinstance(camera, str) and "://" in camera:
                raise SensorLostError(f"{name_of(camera)} cannot be opened: its sender does not answer there")
            named = isinstance(camera, str) and not Path(camera).exists()
            why = "is not an index, a URL, or a file or device that is there" if named else "cannot be opened"
            raise SensorLostError(f"{name_of(camera)} {why}; `ami doctor experiment=…` lists cameras by index")
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        for key, value in requested.items():
            self._capture.set(key, value)
        is_file = isinstance(camera, str) and Path(camera).is_file()
        self._pace_s = 1.0 / max(1.0, self._capture.get(cv2.CAP_PROP_FPS)) if is_file else 0.0
        self._due_at = time.monotonic()
        self._patience_s = SLOW_FRAME_S if isinstance(camera, int) and CAMERAS == cv2.CAP_DSHOW else 0.0

    def read(self) -> Array | None:
        if self._pace_s:  # otherwise a file would end at once
            time.sleep(max(0.0, self._due_at - time.monotonic()))
            self._due_at = max(self._due_at + self._pace_s, time.monotonic())
        deadline = time.monotonic() + self._patience_s
        while True:
            frame: Array
            delivered, frame = self._capture.read()
            if delivered:
                return frame
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def release(self) -> None:
        self._capture.release()


class SameSource:
    """A device that is reopened by its number, which may belong to another one by then: its frame size is checked."""

    def __init__(self, camera: int | str, source: OpenCVSource, shapes: list[tuple[int, ...]]) -> None:
        """
        Args:
            camera: index or device path, for messages.
            source: the device as just opened.
            shapes: of the first moving picture ever, (h, w[, 3]), once there was one; shared by all openings. A still
                one may be the placeholder that OBS shows, in any size, until it runs.
        """
        self._camera, self._source, self._shapes = camera, source, shapes
        self._still: Array | None = None

    def read(self) -> Array | None:
        """Return the next frame, (h, w[, 3]) uint8; raise SensorLostError if its size differs from the first one's."""
        frame = self._source.read()
        if frame is None:
            return None
        if not self._shapes:
            if self._still is not None and frame.shape == self._still.shape and (frame != self._still).any():
                self._shapes.append(frame.shape)
            self._still = frame
        elif frame.shape != self._shapes[0]:
            now, before = ("{1}x{0}".format(*shape) for shape in (frame.shape, self._shapes[0]))
            raise SensorLostError(
                f"camera {self._camera} has {now} pixels, and had {before}: its number may be another camera's now; "
                "restart the body if it is the right one"
            )
        return frame

    def release(self) -> None:
        self._source.release()


def _open(capture: cv2.VideoCapture, camera: int | str) -> bool:
    try:
        if isinstance(camera, int):
            return capture.open(camera, CAMERAS)
        if "://" in camera:
            timeouts = [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS,
            ]  # fmt: skip
            return capture.open(_dialled(camera), cv2.CAP_FFMPEG, timeouts)
        if camera.startswith("/dev/"):  # FFmpeg, which is tried first, may wait for a frame for ever
            return capture.open(camera, cv2.CAP_V4L2)
        return capture.open(camera)
    except cv2.error:
        return False


def name_of(camera: int | str) -> str:
    """Return what a camera is called in messages: without a password."""
    return f"camera {without_passwords(repr(camera))}"


def _dialled(url: str) -> str:
    """Return a URL with 0.0.0.0 replaced by loopback, since Windows cannot connect to 0.0.0.0."""
    return re.sub(r"^(https?|rtsp)://0\.0\.0\.0(?=[:/]|$)", r"\1://127.0.0.1", url) if "listen" not in url else url


def check_seconds(**values: object) -> None:
    """Raise ConfigurationError if a value is not a number of seconds above 0."""
    for name, value in values.items():
        if not is_finite_number(value) or value <= 0:
            raise ConfigurationError(
                f"inference.environment.sensor.{name}={value!r} must be a number of seconds above 0"
            )


class OpenCVImageSensor:
    """The newest frame of a camera, as the agent's observation."""

    def __init__(
        self,
        camera: int | str | None,
        height: int,
        width: int,
        capture_width: int | None = None,
        capture_height: int | None = None,
        frame_rate: float | None = None,
        freeze_after: float = 2.0,
        same_picture_after: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Start the thread that opens the camera and captures.

        Args:
            camera: index, device path, URL, or a video file, which is played at its own speed, and is lost for a moment
                at its end (for recordings there is VideoSensor); None is refused, with a hint how to find the right
                one.
            height: of the observation, in pixels.
            width: of the observation, in pixels.
            capture_width: requested from the device, in pixels, together with the height; None = its default.
            capture_height: requested from the device, in pixels; None = its default.
            frame_rate: requested from the device, in frames per second; None = its default.
            freeze_after: seconds without a frame after which the camera counts as lost.
            same_picture_after: seconds of unchanged pixels, while the body observes, after which it counts as frozen;
                None = never.
            clock: tells the time.

        Raises:
            ConfigurationError: no camera is named, or a value is out of range.
        """
        if camera is None:
            raise ConfigurationError(
                "inference.environment.sensor.camera is not set: `ami doctor experiment=…` lists the cameras by index; "
                "OBS's virtual camera is the one with the size of OBS's canvas"
            )
        is_index = type(camera) is int and camera >= 0  # a negative one would be any camera, perhaps of the room
        if not is_index and not (isinstance(camera, str) and camera):
            raise ConfigurationError(
                f"inference.environment.sensor.camera={camera!r} must be an index, 0 or more, a device "
                "path, a file or a URL"
            )
        self._size = checked_size(height, width)
        check_seconds(freeze_after=freeze_after)
        if same_picture_after is not None:
            check_seconds(same_picture_after=same_picture_after)
        cv2.setNumThreads(1)
        wanted = {
            cv2.CAP_PROP_FRAME_WIDTH: capture_width,
            cv2.CAP_PROP_FRAME_HEIGHT: capture_height,
            cv2.CAP_PROP_FPS: frame_rate,
        }
        requested = {key: float(value) for key, value in wanted.items() if value is not None}
        is_device = isinstance(camera, int) or camera.startswith("/dev/")
        if (capture_width is None) != (capture_height is None):  # drivers ignore one alone
            raise ConfigurationError(
                "inference.environment.sensor: set both capture_width and capture_height, or neither"
            )
        if requested and not is_device:
            raise ConfigurationError(
                f"inference.environment.sensor: capture_width, capture_height and frame_rate are for devices: "
                f"{name_of(camera)} is as its sender makes it"
            )
        self._clock = clock or SystemClock()
        shapes: list[tuple[int, ...]] = []

        def opened() -> Source:
            source = OpenCVSource(camera, requested)
            return SameSource(camera, source, shapes) if is_device else source

        self._capture = Capture(
            name_of(camera),
            opened,
            freeze_after,
            same_picture_after,
            self._clock,
        )
        self._capture.start()

    def read(self) -> Observation:
        captured = self._capture.newest()
        image = to_observation(captured.frame, *self._size)
        return Observation(image, self._clock.monotonic() - captured.at, captured.stretch)

    def statistics(self) -> Mapping[str, Any]:
        capture = self._capture
        return {"sensor": capture.source_name, "frames": capture.frames, "camera_losses": capture.losses}

    def close(self) -> None:
        self._capture.close()
