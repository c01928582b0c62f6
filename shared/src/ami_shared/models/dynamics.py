"""Forward dynamics: f(z_t, h_t, a_t) → the next embedding's distribution and the next hidden state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ami_shared.models.sconv import SConv


class SConvBlock(nn.Module):
    """x ← x + (recurrence(LN x) ∘ SiLU(W x)), then x ← x + FFN(LN x); each LayerNorm is its own."""

    def __init__(self, width: int, feedforward: int, dropout: float, normalised: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.recurrence_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.recurrence = SConv(width, normalised)
        self.feedforward = nn.Sequential(nn.Linear(width, feedforward), nn.SiLU(), nn.Linear(feedforward, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Transform x (B, L, W), given the state (B, W) complex64; return x (B, L, W) and the next state (B, W)."""
        remembered, hidden = self.recurrence(self.recurrence_norm(x), hidden)
        x = x + self.dropout(remembered * F.silu(self.gate(x)))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x))), hidden


class ForwardDynamics(nn.Module):
    """Embedding tables for the action, a linear layer, SConv blocks, and a linear layer to the mean of the next z.

    The distribution is Normal(mean, σ = 1/√(2π)), so that −log p = π · (z − mean)² exactly.
    """

    def __init__(
        self,
        embedding: int,
        choices: Sequence[int],
        width: int = 512,
        depth: int = 4,
        feedforward: int = 512,
        action_width: int = 8,
        dropout: float = 0.1,
        normalised: bool = True,
    ) -> None:
        """Build the layers.

        Args:
            embedding: Z, the size of z.
            choices: number of choices of each action dimension.
            width: W, the number of channels of each SConv block.
            depth: number of SConv blocks.
            feedforward: width of the hidden layer of each block's feed-forward branch.
            action_width: size of the vector that represents one dimension's choice.
            dropout: probability of dropping an element in training, on each of a block's two branches.
            normalised: how the recurrences are initialised, see SConv.
        """
        super().__init__()
        self.embedding, self.choices = embedding, tuple(choices)
        self.hidden_shape = (depth, width)
        self.actions = nn.ModuleList(nn.Embedding(n, action_width) for n in choices)
        self.inward = nn.Linear(embedding + action_width * len(self.choices), width)
        self.blocks = nn.ModuleList(SConvBlock(width, feedforward, dropout, normalised) for _ in range(depth))
        self.outward = nn.Linear(width, embedding)

    def initial_hidden(self, batch: int) -> Tensor:
        """Return the hidden state of an empty memory: zeros (batch, depth, W) complex64."""
        return torch.zeros(batch, *self.hidden_shape, dtype=torch.complex64, device=self.outward.weight.device)

    def forward(self, embeddings: Tensor, hidden: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next embeddings along windows of L steps.

        Args:
            embeddings: (B, L, Z) float32.
            hidden: (B, depth, W) complex64, before the first step.
            actions: (B, L, A) int64.

        Returns:
            Means of the next embeddings, (B, L, Z), and the hidden state (B, depth, W) complex64 after the last step.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        self._check(embeddings, hidden, actions)
        acted = [table(actions[..., i]) for i, table in enumerate(self.actions)]
        x = self.inward(torch.cat([embeddings, *acted], dim=-1))
        after = []
        for block, before in zip(self.blocks, hidden.unbind(1), strict=True):
            x, state = block(x, before)
            after.append(state)
        return self.outward(x), torch.stack(after, dim=1)

    def step(self, embedding: Tensor, hidden: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Predict one step.

        Args:
            embedding: (B, Z) float32.
            hidden: (B, depth, W) complex64.
            action: (B, A) int64.

        Returns:
            The mean of the next embedding, (B, Z), and the next hidden state, (B, depth, W) complex64.
        """
        mean, hidden = self(embedding.unsqueeze(1), hidden, action.unsqueeze(1))
        return mean.squeeze(1), hidden

    def _check(self, embeddings: Tensor, hidden: Tensor, actions: Tensor) -> None:
        given = embeddings.shape
        if len(given) != 3 or given[2] != self.embedding or given[1] == 0 or not embeddings.is_floating_point():
            raise ValueError(f"embeddings {_told(embeddings)} must be real (B, L, {self.embedding}), L at least 1")
        expected = (given[0], *self.hidden_shape)
        if hidden.shape != expected or hidden.dtype != torch.complex64:
            raise ValueError(f"hidden {_told(hidden)} must be complex64 {expected}")
        expected = (given[0], given[1], len(self.choices))
        if actions.shape != expected or actions.dtype != torch.int64:
            raise ValueError(f"actions {_told(actions)} must be int64 {expected}")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def negative_log_density(mean: Tensor, target: Tensor) -> Tensor:
    """Return −log p of each element under Normal(mean, 1/√(2π)): π · (mean − target)². Shapes must be equal."""
    if mean.shape != target.shape:
        raise ValueError(f"mean {tuple(mean.shape)} against target {tuple(target.shape)}")
    return math.pi * (mean - target).square()


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimiser's parameter groups: weight decay for matrices, none for recurrences, biases and norms."""
    recurrent = {id(p) for part in module.modules() if isinstance(part, SConv) for p in part.parameters()}
    parameters = list(module.parameters())
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in recurrent]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in recurrent]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
