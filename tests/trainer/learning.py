"""A tiny trainer, and records for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ami_shared.models.vae import ImageDecoder, ImageEncoder
from ami_shared.records import Record, RecordBatch
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.trainers.image_vae import ImageVAETrainer

SIZE = 36


def tiny_trainer(**options: Any) -> ImageVAETrainer:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"height": SIZE, "width": SIZE, "channels": [8, 8, 8], "embedding": 16}
    settings = {"batch_size": 8, "first_after": 4, "burst": 5, "updates_per_record": 1.0, **options}
    encoder, decoder = ImageEncoder(**shape, hidden=32), ImageDecoder(**shape)
    return ImageVAETrainer(encoder, decoder, RandomImageBuffer(64, SIZE, SIZE), **settings)


def batch_of(count: int, first: int = 0, **data: np.ndarray) -> RecordBatch:
    """Records of two kinds of frames, dark above or dark below."""
    records = []
    for n in range(first, first + count):
        frame = np.full((3, SIZE, SIZE), 220, np.uint8)
        frame[:, : SIZE // 2] = 30 if n % 2 else 220
        frame[:, SIZE // 2 :] = 220 if n % 2 else 30
        records.append(Record(0, n, 0.0, 0.0, {}, data or {"observation": frame}))
    return RecordBatch.stack("body", "a", records)


def numbered(count: int, first: int = 0, life: str = "a") -> RecordBatch:
    """Small records of one body that carry their own number."""
    records = [Record(0, n, 0.0, 0.0, {}, {"number": np.full(8, n)}) for n in range(first, first + count)]
    return RecordBatch.stack("body", life, records)
