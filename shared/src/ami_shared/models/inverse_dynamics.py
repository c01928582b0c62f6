"""Inverse dynamics (Pathak et al. 2017): p(a_t | z_t, z_{t+1}), by which an encoder learns what actions change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InverseDynamics(nn.Module):
    """One hidden layer over both embeddings, and a categorical distribution for each action dimension."""

    def __init__(self, embedding: int, choices: Sequence[int], hidden: int) -> None:
        """Build the layers.

        Args:
            embedding: Z, the size of z.
            choices: number of choices of each action dimension.
            hidden: width of the hidden layer.
        """
        super().__init__()
        self.choices = tuple(choices)
        self.layers = nn.Sequential(nn.Linear(2 * embedding, hidden), nn.ReLU(), nn.Linear(hidden, sum(self.choices)))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the logits of all choices, (B, sum(choices)), from the embeddings before and after, (B, Z) each."""
        logits: Tensor = self.layers(torch.cat([before, after], dim=-1))
        return logits

    def cross_entropy(self, logits: Tensor, actions: Tensor) -> Tensor:
        """Return −log p of actions (B, A) int64 in nats, (B,): the sum over the action dimensions."""
        losses = [F.cross_entropy(part, actions[:, i], reduction="none") for i, part in enumerate(self.split(logits))]
        return torch.stack(losses).sum(dim=0)

    def likeliest(self, logits: Tensor) -> Tensor:
        """Return the likeliest action, (B, A) int64."""
        return torch.stack([part.argmax(dim=-1) for part in self.split(logits)], dim=-1)

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of each action dimension, (B, choices)."""
        return torch.split(logits, list(self.choices), dim=-1)
