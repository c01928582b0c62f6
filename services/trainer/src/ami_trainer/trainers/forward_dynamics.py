"""Trains the forward dynamics: from embedding, hidden state and action to the next embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import ConfigurationError, WireError
from ami_shared.metrics import Picture
from ami_shared.models.dynamics import ForwardDynamics, decay_groups, negative_log_density
from ami_shared.models.replicas import Replicas
from ami_shared.records import RecordBatch
from ami_trainer.buffers.columns import form, observation_form
from ami_trainer.buffers.time_series import TimeSeriesBuffer
from ami_trainer.compute import Compute
from ami_trainer.data_parallel import Batch, Losses, Team
from ami_trainer.optimisation import GuardedOptimiser, fused_if_possible
from ami_trainer.pictures import side_by_side, to_bytes
from ami_trainer.settings import check_counts, check_numbers, check_positive, given
from ami_trainer.trainers.minibatch import MinibatchTrainer

MODEL, ENCODER, DECODER = "forward_dynamics", "image_encoder", "image_decoder"
COLUMNS = ("observation", "hidden", "action")
DREAMT = 5
TELLING = 0.01  # surprise at no change; below it the untrained embeddings hardly distinguish frames
STRIP = 8


class ForwardDynamicsTrainer(MinibatchTrainer[TimeSeriesBuffer]):
    """Learns from windows of one segment, starting with the hidden state stored in their first record.

    The trainer encodes the frames again with its own replica of the encoder, so that all embeddings of a window are of
    one version; the first steps of a window only refresh the stored hidden state (Kapturowski et al. 2019).
    """

    def __init__(
        self,
        dynamics: ForwardDynamics,
        encoder: nn.Module,
        decoder: nn.Module | None = None,
        capacity: int = 2048,
        window: int = 16,
        burn_in: int = 4,
        batch_size: int = 8,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        updates_per_record: float = 0.5,
        burst: int = 20,
        first_after: int = 64,
        device: str = "cpu",
        precision: str = "float32",
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        """Check the settings and allocate buffer and optimiser.

        Args:
            dynamics: the model to train.
            encoder: laid out like the one of the trainer that learns it; filled from its snapshots.
            decoder: likewise; it only draws, and without one there are no pictures.
            capacity: records kept of each body.
            window: predictions in a window, including the burn-in.
            burn_in: first steps of each window, which are not learned from.
            batch_size: windows in a minibatch.
            learning_rate: of AdamW.
            weight_decay: of AdamW, for matrices only.
            max_grad_norm: gradients are clipped to this norm; None = not at all.
            updates_per_record: see MinibatchTrainer.
            burst: see MinibatchTrainer.
            first_after: see MinibatchTrainer.
            device: see Compute.
            precision: see Compute.
            compile: see Compute.
            seed: of the sampling.

        Raises:
            ConfigurationError: a value is out of range.
        """
        check_counts(capacity=capacity, window=window, batch_size=batch_size, burst=burst, first_after=first_after)
        check_numbers(learning_rate=learning_rate, weight_decay=weight_decay)
        check_positive(**given(max_grad_norm=max_grad_norm))
        if type(burn_in) is not int or not 0 <= burn_in < window:
            raise ConfigurationError(f"trainers.NAME.burn_in={burn_in!r} must be a whole number from 0 to {window - 1}")
        if capacity <= max(window, first_after - 1):
            raise ConfigurationError(
                f"trainers.NAME.capacity={capacity} must exceed window and be at least first_after"
            )
        self._compute = Compute(device, precision, compile)
        self._dynamics = self._compute.place(dynamics)
        followed = {ENCODER: encoder, **given(**{DECODER: decoder})}
        self._followed = {name: module.to(self._compute.device) for name, module in followed.items()}
        self._replicas = Replicas({})
        forms = {"hidden": form(np.complex64, *dynamics.hidden_shape), **observation_form(encoder)}
        buffer = TimeSeriesBuffer(capacity, COLUMNS, seed, forms, dynamics.choices)
        self._length, self._burn_in, self._batch_size = window + 1, burn_in, batch_size
        groups = decay_groups(dynamics, weight_decay)
        adam = torch.optim.AdamW(groups, learning_rate, fused=fused_if_possible(dynamics))
        optimiser = GuardedOptimiser({MODEL: dynamics}, adam, max_grad_norm)
        super().__init__(buffer, optimiser, updates_per_record, burst, first_after)

    @property
    def published_models(self) -> Mapping[str, nn.Module]:
        return {MODEL: self._dynamics}

    @property
    def followed_models(self) -> Mapping[str, nn.Module]:
        return self._followed

    def follow(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def share(self, team: Team) -> None:
        self._optimiser.share(team, self._losses, self._encoder_in_use)

    def _encoder_in_use(self) -> tuple[int, nn.Module]:
        return self._replicas.versions[ENCODER], self._replicas[ENCODER]

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        if "hidden" in batch.data and not np.isfinite(batch.data["hidden"]).all():
            raise WireError(f"hidden states of {batch.body} are not finite")
        self._buffer.add(batch, continues)
        self._limiter.record(len(batch))

    def is_trainable(self) -> bool:
        return (
            super().is_trainable()
            and self._replicas.newest_versions().get(ENCODER, 0) > 0
            and self._buffer.windows(self._length) > 0
        )

    def train(self) -> Iterator[Mapping[str, float]]:
        self._replicas.swap()
        if self._replicas.versions.get(ENCODER, 0) > 0:  # a newer one may be arriving already
            yield from super().train()

    def _minibatch(self) -> Batch | None:
        windows = self._buffer.sample(self._batch_size, self._length)
        return self._on_device(windows) if windows else None

    def _losses(self, batch: Batch) -> Losses:
        self._dynamics.train()
        return {"loss": self._surprise(*self._encoded(batch)).mean()}

    def _on_device(self, windows: Mapping[str, np.ndarray[Any, Any]]) -> Batch:
        """Return windows' frames (B, L+1, 3, H, W), first hidden states (B, depth, W) and actions (B, L, A)."""
        hidden, actions = windows["hidden"][:, 0], windows["action"][:, :-1]
        arrays = (windows["observation"], np.ascontiguousarray(hidden), np.ascontiguousarray(actions))
        return tuple(self._compute.tensor(array) for array in arrays)

    @torch.no_grad()
    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch with embeddings (B, L+1, Z) instead of the frames."""
        frames, hidden, actions = batch
        with self._compute.autocast():
            embeddings = self._replicas[ENCODER](frames.flatten(0, 1)).float().unflatten(0, frames.shape[:2])
        return embeddings, hidden, actions

    def _surprise(self, embeddings: Tensor, hidden: Tensor, actions: Tensor) -> Tensor:
        """Return −log p of each prediction after the burn-in, (B, L − burn_in, Z)."""
        with self._compute.autocast():
            means, _ = self._dynamics(embeddings[:, :-1], hidden, actions)
        return negative_log_density(means[:, self._burn_in :].float(), embeddings[:, 1 + self._burn_in :])

    @torch.no_grad()
    def _measure_fresh(self) -> dict[str, float]:
        """Return the loss on windows not yet trained on, and that of predicting no change."""
        windows = self._buffer.take_fresh(self._length, self._batch_size)
        if windows is None:
            return {}
        self._dynamics.eval()
        embeddings, hidden, actions = self._encoded(self._on_device(windows))
        loss = self._surprise(embeddings, hidden, actions).mean().item()
        still = negative_log_density(embeddings[:, self._burn_in : -1], embeddings[:, 1 + self._burn_in :])
        of_no_change = still.mean().item()
        if of_no_change > TELLING:  # the embeddings' scale changes while they are learned
            self._fresh_error.note(loss, of_no_change)
        return {"fresh_loss": loss, "fresh_loss_of_no_change": of_no_change}

    @torch.no_grad()
    def picture(self) -> Picture | None:
        """Return four rows of frames: seen, reconstructed, predicted one step ahead, dreamt from the middle onwards."""
        windows = self._buffer.newest(max(self._length, self._burn_in + STRIP + 1))
        if windows is None or self._replicas.versions.get(DECODER, 0) == 0:
            return None
        self._dynamics.eval()
        embeddings, hidden, actions = self._encoded(self._on_device(windows))
        means, _ = self._dynamics(embeddings[:, :-1], hidden, actions)
        seen = windows["observation"][0, -STRIP:]
        rows = [seen, *(self._drawn(row) for row in (embeddings[0, -STRIP:], means[0, -STRIP:]))]
        rows.append(self._drawn(self._dream(embeddings, hidden, actions)))
        return Picture("imagination", self.updates, np.concatenate([side_by_side(row) for row in rows]))

    def _dream(self, embeddings: Tensor, hidden: Tensor, actions: Tensor) -> Tensor:
        """Return embeddings (STRIP, Z): predictions from what was seen, then DREAMT ones from predictions alone."""
        awake = actions.shape[1] - DREAMT
        means, hidden = self._dynamics(embeddings[:, :awake], hidden, actions[:, :awake])
        dreams = list(means[0, DREAMT - STRIP :])
        embedding = means[:, -1]
        for t in range(awake, actions.shape[1]):
            embedding, hidden = self._dynamics.step(embedding, hidden, actions[:, t])
            dreams.append(embedding[0])
        return torch.stack(dreams)

    def _drawn(self, embeddings: Tensor) -> np.ndarray[Any, Any]:
        return to_bytes(self._replicas[DECODER](embeddings))
