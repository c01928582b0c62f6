"""What trainers' pictures are made of."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ami_shared.wire import Array


def to_bytes(frames: Tensor) -> Array:
    """Return frames of numbers from 0 to 1, of any shape and device, as uint8 from 0 to 255."""
    pixels: Array = frames.clamp(0, 1).mul(255).round().byte().cpu().numpy()
    return pixels


def side_by_side(frames: Array) -> Array:
    """Return frames (N, 3, H, W) as one row (H, N·W, 3)."""
    return np.concatenate(list(frames.transpose(0, 2, 3, 1)), axis=1)
