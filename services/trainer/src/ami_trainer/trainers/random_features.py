"""Publishes an observation encoder that never learns: random features, scaled once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ami_shared.errors import ConfigurationError, WireError
from ami_shared.models.vae import ImageEncoder
from ami_shared.records import RecordBatch
from ami_shared.state import restore_each
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.compute import Compute
from ami_trainer.trainers.trainer import PlainTrainer

SMALLEST_DEVIATION = 0.01


class RandomFeaturesTrainer(PlainTrainer):
    """Random features as initialised (Burda et al. 2018, Large-Scale Study of Curiosity-Driven Learning).

    When the buffer is full, its frames normalise the encoder once: see normalise(). After that nothing changes. The
    encoder itself shows whether that has been done (its batch norms have counted a batch), so that a snapshot is all
    that a trainer needs to continue.
    """

    def __init__(self, encoder: ImageEncoder, buffer: RandomImageBuffer, device: str = "cpu") -> None:
        """Check the buffer, and place the encoder on its device.

        Args:
            encoder: see ami_shared.models.vae.
            buffer: its capacity is the number of frames with which the encoder is normalised, in a single batch.
            device: see Compute.

        Raises:
            ConfigurationError: the buffer is too small.
        """
        if buffer.capacity < 2:
            raise ConfigurationError(f"trainers.NAME.buffer.capacity={buffer.capacity} must be 2 frames or more")
        self._compute = Compute(device)
        self._encoder, self._buffer = self._compute.place(encoder), buffer
        self.updates = 0

    @property
    def published_models(self) -> Mapping[str, nn.Module]:
        return {"image_encoder": self._encoder}

    @property
    def history(self) -> int:
        return self._buffer.capacity

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        if "observation" not in batch.data:
            raise WireError(f"records of {batch.body} carry no observation")
        if len(self._buffer) < self._buffer.capacity:
            self._buffer.add(batch.data["observation"])

    def is_trainable(self) -> bool:
        return len(self._buffer) >= self._buffer.capacity and not is_normalised(self._encoder)

    def train(self) -> Iterator[Mapping[str, float]]:
        """Normalise the encoder: the only step."""
        begin = time.perf_counter()
        self._buffer.take_fresh()  # so that these are drawn too
        frames = self._compute.tensor(self._buffer.spread(self._buffer.capacity))
        deviation = normalise(self._encoder, frames)
        self.updates += 1
        yield {"deviation_as_initialised": deviation, "step_time_ms": (time.perf_counter() - begin) * 1e3}

    def state(self) -> Mapping[str, Any]:
        return {"buffer": self._buffer.state(), "updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        restore_each({"buffer": self._buffer}, state)

    def statistics(self) -> Mapping[str, Any]:
        return {"updates": self.updates, "losses": {}, "buffer": self._buffer.statistics()}


def is_normalised(encoder: nn.Module) -> bool:
    """Return whether the encoder's batch norms have seen frames."""
    return any(int(part.num_batches_tracked) for part in _batch_norms(encoder))  # type: ignore[arg-type]


@torch.no_grad()
def normalise(encoder: ImageEncoder, frames: Tensor) -> float:
    """Scale each element of the embedding to mean 0 and deviation 1 over frames (N, 3, H, W) uint8.

    The batch norms keep the statistics of these frames, and the last layer is scaled and shifted. Raw features of an
    untrained encoder differ by a few hundredths between frames: far too little for dynamics with a fixed σ ≈ 0.4.
    An element that hardly varies is scaled by at most 1 / SMALLEST_DEVIATION.

    Returns:
        The root mean square over the embedding of the deviations before scaling.
    """
    for part in _batch_norms(encoder):
        part.reset_running_stats()
        part.momentum = None  # the mean over all batches, here one
    encoder.train()
    encoder(frames)
    encoder.eval()
    head = encoder.mean_head
    seen: Tensor = encoder(frames)
    deviation = seen.std(dim=0, correction=0)
    scale = deviation.clamp(min=SMALLEST_DEVIATION).reciprocal()
    head.bias.copy_((head.bias - seen.mean(dim=0)) * scale)
    head.weight.mul_(scale[:, None])
    return deviation.square().mean().sqrt().item()


def _batch_norms(encoder: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
