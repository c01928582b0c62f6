"""Recorded experience: video files, played in a loop, one frame per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2

from ami_inference.sensors.frames import checked_size, to_observation
from ami_inference.sensors.sensor import Observation
from ami_shared.errors import ConfigurationError
from ami_shared.wire import Array

SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg"}


class VideoSensor:
    """The frames of one video file, or of all in a folder in the order of their names.

    Each file is a separate stretch: at its end a new segment begins.
    """

    def __init__(self, path: str, height: int, width: int, every: int = 1) -> None:
        """Find the files; the first frame is decoded when it is read.

        Args:
            path: a video file, or a folder of them.
            height: of the observation, in pixels.
            width: of the observation, in pixels.
            every: use every n-th frame, e.g. 3 for a 30 Hz video at 10 steps a second.

        Raises:
            ConfigurationError: there is no video, or `every` is out of range.
        """
        if type(every) is not int or every < 1:
            raise ConfigurationError(f"inference.environment.sensor.every={every!r} must be a whole number, 1 or more")
        self._files = _video_files(Path(path))
        self._size = checked_size(height, width)
        self._every = every
        self._stretch = -1
        self._frames = self._play()
        self._playing = self._files[0]
        self._position = self._skip = 0  # in frames of the file

    def read(self) -> Observation:
        frame = next(self._frames)
        return Observation(to_observation(frame, *self._size), 0.0, self._stretch)

    def _play(self) -> Iterator[Array]:
        turn = self._files.index(self._playing)
        while True:
            shown = self._skip
            for file in [*self._files[turn:], *self._files[:turn]]:
                self._playing = file
                self._stretch += 1
                for frame in self._frames_of(file):
                    shown += 1
                    yield frame
            if not shown:
                raise ConfigurationError(f"no frame can be read from {self._playing}: is it a video?")

    def _frames_of(self, file: Path) -> Iterator[Array]:
        capture = cv2.VideoCapture(str(file))
        self._position, self._skip = self._skip, 0
        if self._position:
            capture.set(cv2.CAP_PROP_POS_FRAMES, self._position)
        try:
            while True:
                for _ in range(self._every - 1):
                    capture.grab()
                delivered, frame = capture.read()
                if not delivered:
                    return
                self._position += self._every
                yield frame
        finally:
            capture.release()

    def state(self) -> Mapping[str, Any]:
        return {"file": self._playing.name, "frame": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the last frame shown, if its file still exists."""
        for file in self._files:
            if file.name == state["file"]:
                self._playing = file
                self._position = self._skip = int(state["frame"])

    def statistics(self) -> Mapping[str, Any]:
        return {"sensor": f"video {self._playing.name}"}

    def close(self) -> None:
        self._frames.close()  # type: ignore[attr-defined]


def _video_files(path: Path) -> list[Path]:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ConfigurationError(f"no video at {str(path)!r}: set inference.environment.sensor.path")
    return files
