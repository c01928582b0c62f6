"""The newest picture, and its JPEG: encoded once, for the first reader, and shared by all.

There is no queue: a slow reader gets the newest picture and misses those in between.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Jpeg:
    """An encoded picture, and its number."""

    number: int
    data: bytes


class Frames:
    """Written by the game, read by any number of threads."""

    def __init__(self, quality: int) -> None:
        self._quality = quality
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._picture: NDArray[np.uint8] | None = None
        self._number = 0
        self._jpeg = Jpeg(0, b"")
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def publish(self, picture: NDArray[np.uint8]) -> None:
        """Make a picture, (H, W, 3) uint8 BGR, the newest one; it must not be changed any more."""
        with self._changed:
            self._picture = picture
            self._number += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wake all waiting readers; there will be no more pictures."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def newest(self, after: int = 0, timeout_s: float = 1.0) -> Jpeg | None:
        """Wait for a picture newer than number `after`; return None if there is none in time, or no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._number > after, timeout_s)
            picture, number = self._picture, self._number
        if self._closed or picture is None or number <= after:
            return None
        with self._encoding:
            if self._jpeg.number < number:
                self._jpeg = Jpeg(number, encode_jpeg(picture, self._quality))
            return self._jpeg


def encode_jpeg(picture: NDArray[np.uint8], quality: int) -> bytes:
    """Encode a picture as JPEG.

    Args:
        picture: (H, W, 3) uint8, BGR.
        quality: 0 to 100.

    Raises:
        ValueError: OpenCV cannot encode it.
    """
    done, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"OpenCV could not encode a picture of shape {picture.shape}")
    return data.tobytes()
