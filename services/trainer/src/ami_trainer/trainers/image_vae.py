"""Trains the observation encoder as a variational autoencoder on random frames of the past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import ConfigurationError, WireError
from ami_shared.metrics import Picture
from ami_shared.models.vae import ImageEncoder, kl_to_standard_normal, reconstruction_loss, to_float
from ami_shared.records import RecordBatch
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.compute import Compute
from ami_trainer.data_parallel import Batch, Losses, Team
from ami_trainer.optimisation import GuardedOptimiser, fused_if_possible
from ami_trainer.pictures import side_by_side, to_bytes
from ami_trainer.settings import check_counts, check_numbers
from ami_trainer.trainers.minibatch import MinibatchTrainer

PICTURE_FRAMES = 8


class ImageVAETrainer(MinibatchTrainer[RandomImageBuffer]):
    """Minimises mean squared error + kl_weight · KL(N(μ, σ) ‖ N(0, 1)) (Kingma & Welling 2014)."""

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: nn.Module,
        buffer: RandomImageBuffer,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        kl_weight: float = 1e-4,
        updates_per_record: float = 2.0,
        burst: int = 20,
        first_after: int = 32,
        device: str = "cpu",
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        """Check the settings and create the optimiser.

        Args:
            encoder: see ami_shared.models.vae; agents use its mean.
            decoder: see ami_shared.models.vae; it draws pictures.
            buffer: of frames.
            batch_size: frames in a minibatch, 2 or more.
            learning_rate: of Adam.
            kl_weight: weight of the KL divergence.
            updates_per_record: see MinibatchTrainer.
            burst: see MinibatchTrainer.
            first_after: see MinibatchTrainer.
            device: see Compute.
            precision: see Compute.
            compile: see Compute.

        Raises:
            ConfigurationError: a value is out of range, or encoder, decoder and buffer differ in shape.
        """
        check_counts(batch_size=batch_size, burst=burst, first_after=first_after)
        check_numbers(learning_rate=learning_rate, kl_weight=kl_weight)
        if batch_size < 2:
            raise ConfigurationError(
                "trainers.NAME.batch_size=1 is too small for the encoder's batch norms: set 2 or more"
            )
        if buffer.capacity < first_after:
            raise ConfigurationError(
                f"trainers.NAME.buffer.capacity={buffer.capacity} must be at least first_after={first_after}"
            )
        _check_fit(encoder, decoder, buffer)
        self._compute = Compute(device, precision, compile)
        self._encoder, self._decoder = self._compute.place(encoder), self._compute.place(decoder)
        self._posterior = self._compute.compiled(encoder.posterior)
        self._batch_size, self._kl_weight = batch_size, kl_weight
        parameters = [*encoder.parameters(), *decoder.parameters()]
        adam = torch.optim.Adam(parameters, learning_rate, fused=fused_if_possible(encoder, decoder))
        optimiser = GuardedOptimiser({"encoder": encoder, "decoder": decoder}, adam)
        super().__init__(buffer, optimiser, updates_per_record, burst, first_after)

    def share(self, team: Team) -> None:
        """Let all ranks of a team compute each gradient; raise ConfigurationError if their shares are too small."""
        if self._batch_size < 2 * team.size:
            raise ConfigurationError(
                f"trainers.NAME.batch_size={self._batch_size} is too small for {team.size} processes: the encoder's "
                f"batch norms need 2 frames or more in each"
            )
        super().share(team)

    @property
    def published_models(self) -> Mapping[str, nn.Module]:
        return {"image_encoder": self._encoder, "image_decoder": self._decoder}

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        if "observation" not in batch.data:
            raise WireError(f"records of {batch.body} carry no observation")
        self._buffer.add(batch.data["observation"])
        self._limiter.record(len(batch))

    def _minibatch(self) -> Batch:
        return (self._compute.tensor(self._buffer.sample(self._batch_size)),)

    def _losses(self, batch: Batch) -> Losses:
        self._encoder.train()
        self._decoder.train()
        (observation,) = batch
        with self._compute.autocast():
            mean, deviation = self._posterior(observation)
            frames = self._decoder(mean + deviation * torch.randn_like(deviation))
        reconstruction = reconstruction_loss(frames.float(), to_float(observation))
        kl = kl_to_standard_normal(mean.float(), deviation.float())
        loss = reconstruction + self._kl_weight * kl
        return {"loss": loss, "reconstruction_loss": reconstruction, "kl_loss": kl}

    @torch.inference_mode()
    def _measure_fresh(self) -> dict[str, float]:
        """Return the reconstruction error on frames that arrived since the last time, before any training on them.

        A minibatch of the newest suffices: with fast streams, all would cost as much as a gradient step.
        """
        fresh = self._buffer.take_fresh()[-self._batch_size :]
        if len(fresh) == 0:
            return {}
        observation = self._compute.tensor(fresh)
        error = reconstruction_loss(self._reconstruct(observation), to_float(observation)).item()
        self._fresh_error.note(error)
        return {"fresh_reconstruction_error": error}

    @torch.inference_mode()
    def _reconstruct(self, observation: Tensor) -> Tensor:
        self._encoder.eval()
        self._decoder.eval()
        frames: Tensor = self._decoder(self._encoder(observation))
        return frames

    def restore(self, state: Mapping[str, Any]) -> None:
        if "fresh_error" in state:  # in older checkpoints
            state = {**state, "fresh": dict(zip(("first", "now"), state["fresh_error"], strict=True))}
        super().restore(state)

    def picture(self) -> Picture | None:
        """Return past frames above their reconstructions: (2H, 8W, 3) uint8."""
        if len(self._buffer) < PICTURE_FRAMES:
            return None
        frames = self._buffer.spread(PICTURE_FRAMES)
        made = to_bytes(self._reconstruct(self._compute.tensor(frames)))
        return Picture("reconstructions", self.updates, np.concatenate([side_by_side(frames), side_by_side(made)]))


@torch.inference_mode()
def _check_fit(encoder: ImageEncoder, decoder: nn.Module, buffer: RandomImageBuffer) -> None:
    """Raise ConfigurationError if frames do not come out of the models, or out of the buffer, as they go in."""
    shape = getattr(encoder, "observation_shape", None)
    if shape is None:  # an encoder of one's own need not say
        return
    if buffer.frame_shape != shape:
        raise ConfigurationError(
            f"trainers.NAME.buffer: its frames are {buffer.frame_shape}, but those of models.image_encoder are {shape}"
        )
    encoder.eval()
    decoder.eval()
    try:
        made = tuple(decoder(encoder(torch.zeros(1, *shape, dtype=torch.uint8))).shape[1:])
    except RuntimeError as error:
        raise ConfigurationError(f"models.image_decoder does not fit models.image_encoder: {error}") from None
    if made != shape:
        raise ConfigurationError(f"models.image_decoder makes frames of {made}, models.image_encoder takes {shape}")
