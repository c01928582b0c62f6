"""Trains the observation encoder to represent what actions change: from two successive frames to the action between."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import ConfigurationError
from ami_shared.models.inverse_dynamics import InverseDynamics
from ami_shared.records import RecordBatch
from ami_shared.wire import Array
from ami_trainer.buffers.columns import observation_form
from ami_trainer.buffers.time_series import TimeSeriesBuffer
from ami_trainer.compute import Compute
from ami_trainer.data_parallel import Batch, Losses
from ami_trainer.optimisation import GuardedOptimiser, fused_if_possible
from ami_trainer.settings import check_counts, check_numbers, check_positive, given
from ami_trainer.trainers.minibatch import MinibatchTrainer

PAIR = 2


class InverseDynamicsTrainer(MinibatchTrainer[TimeSeriesBuffer]):
    """Minimises the cross entropy of a_t, given the embeddings of o_t and o_{t+1} (Pathak et al. 2017).

    Nothing fixes the embedding's scale; normalised rewards do not depend on it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        inverse: InverseDynamics,
        capacity: int = 2048,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        max_grad_norm: float | None = 1.0,
        updates_per_record: float = 1.0,
        burst: int = 20,
        first_after: int = 64,
        device: str = "cpu",
        precision: str = "float32",
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        """Check the settings and allocate buffer and optimiser.

        Args:
            encoder: see ami_shared.models.vae; its mean is the embedding.
            inverse: predicts the action; published too, so that a restarted trainer has it.
            capacity: records kept of each body.
            batch_size: pairs of successive frames in a minibatch.
            learning_rate: of Adam.
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
        check_counts(capacity=capacity, batch_size=batch_size, burst=burst, first_after=first_after)
        check_numbers(learning_rate=learning_rate)
        check_positive(**given(max_grad_norm=max_grad_norm))
        if capacity < max(PAIR, first_after):
            raise ConfigurationError(
                f"trainers.NAME.capacity={capacity} must be at least {PAIR} and at least first_after={first_after}"
            )
        self._compute = Compute(device, precision, compile)
        self._encoder, self._inverse = self._compute.place(encoder), self._compute.place(inverse)
        self._batch_size = batch_size
        columns = ("observation", "action")
        buffer = TimeSeriesBuffer(capacity, columns, seed, observation_form(encoder), inverse.choices)
        parameters = [*encoder.parameters(), *inverse.parameters()]
        adam = torch.optim.Adam(parameters, learning_rate, fused=fused_if_possible(encoder, inverse))
        optimiser = GuardedOptimiser({"encoder": encoder, "inverse": inverse}, adam, max_grad_norm)
        super().__init__(buffer, optimiser, updates_per_record, burst, first_after)

    @property
    def published_models(self) -> Mapping[str, nn.Module]:
        return {"image_encoder": self._encoder, "inverse_dynamics": self._inverse}

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        self._buffer.add(batch, continues)
        self._limiter.record(len(batch))

    def is_trainable(self) -> bool:
        return super().is_trainable() and self._buffer.windows(PAIR) > 0

    def _minibatch(self) -> Batch | None:
        pairs = self._buffer.sample(self._batch_size, PAIR)
        return self._on_device(pairs) if pairs else None

    def _on_device(self, pairs: Mapping[str, Array]) -> Batch:
        """Return frames (B, 2, 3, H, W) uint8, and the actions (B, A) int64 between them."""
        arrays = pairs["observation"], np.ascontiguousarray(pairs["action"][:, 0])
        return tuple(self._compute.tensor(array) for array in arrays)

    def _losses(self, batch: Batch) -> Losses:
        self._encoder.train()
        self._inverse.train()
        frames, actions = batch
        _, logits = self._told(frames)
        return {"loss": self._inverse.cross_entropy(logits, actions).mean()}

    def _told(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, 2, Z) and logits (B, sum(choices)) of pairs of frames (B, 2, 3, H, W) uint8."""
        with self._compute.autocast():
            embeddings = self._encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            logits = self._inverse(embeddings[:, 0], embeddings[:, 1])
        return embeddings.float(), logits.float()

    @torch.no_grad()
    def _measure_fresh(self) -> dict[str, float]:
        """Return loss and accuracy on pairs not yet trained on, and those of a guess by the actions' frequencies.

        The latter are the entropy of the actions in the buffer, and the share of the most frequent one. All are sums or
        means over the action dimensions.
        """
        pairs = self._buffer.take_fresh(PAIR, self._batch_size)
        if pairs is None:
            return {}
        self._encoder.eval()
        self._inverse.eval()
        frames, actions = self._on_device(pairs)
        embeddings, logits = self._told(frames)
        loss = self._inverse.cross_entropy(logits, actions).mean().item()
        self._fresh_error.note(loss)
        entropy, most_frequent = chance(self._buffer.column("action"), self._inverse.choices)
        return {
            "fresh_loss": loss,
            "fresh_loss_of_chance": entropy,
            "fresh_accuracy": (self._inverse.likeliest(logits) == actions).float().mean().item(),
            "fresh_accuracy_of_chance": most_frequent,
            "embedding_deviation": embeddings.flatten(0, 1).std(dim=0, correction=0).mean().item(),
        }


def chance(actions: Array, choices: tuple[int, ...]) -> tuple[float, float]:
    """Return the entropy of actions (N, A) int64 in nats, summed, and the most frequent choice's share, averaged."""
    shares = [np.bincount(actions[:, i], minlength=n) / len(actions) for i, n in enumerate(choices)]
    entropy = -sum(float((share[share > 0] * np.log(share[share > 0])).sum()) for share in shares)
    return entropy, float(np.mean([share.max() for share in shares]))
