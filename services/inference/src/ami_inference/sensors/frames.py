"""From a camera's frame to the agent's observation: colour order, crop, size, layout."""

from __future__ import annotations

import cv2
import numpy as np

from ami_shared.config_checks import MOST_PIXELS
from ami_shared.errors import ConfigurationError, SensorLostError
from ami_shared.wire import Array

LAYERS = {2: (1,), 3: (3, 4)}  # grey; BGR and BGRA


def checked_size(height: object, width: object) -> tuple[int, int]:
    """Return the size of a sensor's observations; raise ConfigurationError if it is none."""
    if not (type(height) is int and type(width) is int and 0 < min(height, width) <= max(height, width) <= MOST_PIXELS):
        raise ConfigurationError(
            f"inference.environment.sensor: height={height!r} and width={width!r} must be 1 to {MOST_PIXELS} pixels"
        )
    return height, width


def to_observation(frame: Array, height: int, width: int) -> Array:
    """Turn a BGR (or BGRA, or grey) frame (h, w[, 3 or 4]) uint8 into RGB (3, height, width) uint8.

    The centre is cropped to the target's aspect ratio, then resized: area averaging to shrink, linear to enlarge.

    Raises:
        SensorLostError: the frame is not such a picture.
    """
    layers = frame.shape[2] if frame.ndim == 3 else 1
    if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or frame.size == 0 or layers not in LAYERS[frame.ndim]:
        raise SensorLostError(f"frame of {frame.dtype} {frame.shape} is not a picture of 8-bit pixels")
    cropped = centre_crop(frame, height, width)
    if cropped.shape[:2] != (height, width):
        shrinks = cropped.shape[0] >= height
        cropped = cv2.resize(cropped, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    code = {2: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB}[cropped.ndim]
    if cropped.ndim == 3 and cropped.shape[2] == 4:
        code = cv2.COLOR_BGRA2RGB
    return np.ascontiguousarray(cv2.cvtColor(cropped, code).transpose(2, 0, 1))


def centre_crop(frame: Array, height: int, width: int) -> Array:
    """Return the largest centred part of a frame (h, w, …) with the aspect ratio of height by width."""
    rows, columns = frame.shape[:2]
    kept_rows = min(rows, max(1, round(columns * height / width)))
    kept_columns = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    return frame[top : top + kept_rows, left : left + kept_columns]
