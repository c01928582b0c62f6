"""Trains the observation encoder as a variational autoencoder on random frames of the past."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import WireError
from ami_shared.metrics import Picture
from ami_shared.models.replicas import Replicas
from ami_shared.models.vae import kl_to_standard_normal, reconstruction_loss, to_float
from ami_shared.records import RecordBatch
from ami_shared.state import restore_each
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.compute import Compute
from ami_trainer.data_parallel import Batch, Losses, Team
from ami_trainer.limiter import UpdateLimiter
from ami_trainer.optimisation import GuardedOptimiser
from ami_trainer.settings import check_counts, check_numbers

PICTURE_FRAMES = 8


class ImageVAETrainer:
    """Kingma & Welling 2014: mean squared error + kl_weight · KL(N(μ, σ) ‖ N(0, 1))."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        buffer: RandomImageBuffer,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        kl_weight: float = 0.01,
        updates_per_record: float = 2.0,
        burst: int = 20,
        first_after: int = 32,
        device: str = "cpu",
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        """Args:
        encoder, decoder: see ami_shared.models.vae; only the encoder is ever published.
        updates_per_record: gradient steps for each new frame.
        burst: gradient steps after which the error on fresh frames is measured anew.
        first_after: frames in the buffer before training begins.
        """
        check_counts(batch_size=batch_size, burst=burst, first_after=first_after)
        check_numbers(learning_rate=learning_rate, kl_weight=kl_weight)
        self._compute = Compute(device, precision, compile)
        self._encoder, self._decoder = self._compute.place(encoder), self._compute.place(decoder)
        self._buffer = buffer
        self._batch_size, self._kl_weight = batch_size, kl_weight
        self._burst, self._first_after = burst, first_after
        self._limiter = UpdateLimiter(updates_per_record)
        optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=learning_rate)
        self._optimiser = GuardedOptimiser({"encoder": encoder, "decoder": decoder}, optimiser)
        self._metrics: dict[str, float] = {}
        self._first_fresh_error: float | None = None
        self._fresh_error: float | None = None
        self.updates = 0

    @property
    def published_models(self) -> Mapping[str, nn.Module]:
        return {"image_encoder": self._encoder, "image_decoder": self._decoder}

    @property
    def followed_models(self) -> Mapping[str, nn.Module]:
        return {}

    @property
    def history(self) -> int:
        return self._buffer.capacity

    def follow(self, replicas: Replicas) -> None:
        """No other model is needed."""

    def share(self, team: Team) -> None:
        self._optimiser.share(team, self._losses)

    def published(self, versions: Mapping[str, int]) -> None:
        """Random frames of the past have no version to compare with."""

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        if "observation" not in batch.data:
            raise WireError(f"records of {batch.body} carry no observation")
        self._buffer.add(batch.data["observation"])
        self._limiter.record(len(batch))

    def is_trainable(self) -> bool:
        return len(self._buffer) >= self._first_after and self._limiter.available() >= 1

    def train(self) -> Iterator[Mapping[str, float]]:
        fresh = self._measure_fresh()
        for _ in range(min(self._burst, self._limiter.available())):
            begin = time.perf_counter()
            self._limiter.spend()
            batch = (self._compute.tensor(self._buffer.sample(self._batch_size)),)
            metrics = self._optimiser.step_on(batch, self._losses) | fresh
            metrics["step_time_ms"] = (time.perf_counter() - begin) * 1e3
            self.updates += 1
            self._metrics = metrics
            yield metrics
            fresh = {}

    def _losses(self, batch: Batch) -> Losses:
        self._encoder.train()
        self._decoder.train()
        (observation,) = batch
        with self._compute.autocast():
            mean, deviation = self._encoder.posterior(observation)  # type: ignore[operator]
            frames = self._decoder(mean + deviation * torch.randn_like(deviation))
        reconstruction = reconstruction_loss(frames.float(), to_float(observation))
        kl = kl_to_standard_normal(mean.float(), deviation.float())
        loss = reconstruction + self._kl_weight * kl
        return {"loss": loss, "reconstruction_loss": reconstruction, "kl_loss": kl}

    @torch.inference_mode()
    def _measure_fresh(self) -> dict[str, float]:
        """Reconstruction error on frames that came since the last burst, before any training on this burst.

        A minibatch of the newest will do: fast streams would make it cost as much as a gradient step.
        """
        fresh = self._buffer.take_fresh()[-self._batch_size :]
        if len(fresh) == 0:
            return {}
        observation = self._compute.tensor(fresh)
        error = reconstruction_loss(self._reconstruct(observation), to_float(observation)).item()
        if self._first_fresh_error is None:
            self._first_fresh_error = error
        self._fresh_error = error
        return {"fresh_reconstruction_error": error}

    @torch.inference_mode()
    def _reconstruct(self, observation: Tensor) -> Tensor:
        self._encoder.eval()
        self._decoder.eval()
        frames: Tensor = self._decoder(self._encoder(observation))
        return frames

    def state(self) -> Mapping[str, Any]:
        return {
            "buffer": self._buffer.state(),
            "optimiser": self._optimiser.state(),
            "limiter": self._limiter.state(),
            "updates": self.updates,
            "fresh_error": [self._first_fresh_error, self._fresh_error],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
        self._first_fresh_error, self._fresh_error = state["fresh_error"]
        restore_each({"optimiser": self._optimiser, "buffer": self._buffer, "limiter": self._limiter}, state)

    def picture(self) -> Picture | None:
        """Frames of the past above, their reconstructions below: (2H, 8W, 3) uint8."""
        if len(self._buffer) < PICTURE_FRAMES:
            return None
        frames = self._buffer.spread(PICTURE_FRAMES)
        made = self._reconstruct(self._compute.tensor(frames)).clamp(0, 1).mul(255).round().byte().cpu().numpy()
        rows = [np.concatenate(list(row.transpose(0, 2, 3, 1)), axis=1) for row in (frames, made)]
        return Picture("reconstructions", self.updates, np.concatenate(rows, axis=0))

    def statistics(self) -> Mapping[str, Any]:
        return {
            "updates": self.updates,
            "losses": {name: value for name, value in self._metrics.items() if "loss" in name},
            "fresh_error": {"first": self._first_fresh_error, "now": self._fresh_error},
            "buffer": self._buffer.statistics(),
            "limiter": {**self._limiter.statistics(), **self._optimiser.statistics()},
        }
