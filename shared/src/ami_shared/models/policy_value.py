"""Policy and value: one trunk, one categorical head for each action dimension, one value head (PPO's networks).

The trunk determines which columns of a record the policy sees: the image, a vector, or embedding and hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ami_shared.models.vae import KERNELS, convolved_sizes, to_float

POLICY_GAIN, VALUE_GAIN, TRUNK_GAIN = 0.01, 1.0, math.sqrt(2.0)


class Trunk(nn.Module):
    """The layers that policy and value share.

    Attributes:
        inputs: the record's columns that it takes, in order.
        features: size of the feature vector that it returns.
        forms: dtype and shape of those columns for which they are known in advance: other records are refused.
    """

    inputs: tuple[str, ...]
    features: int
    forms: Mapping[str, tuple[str, tuple[int, ...]]] = {}


class ImageTrunk(Trunk):
    """The encoder's convolutions without batch norm on the raw image, then two linear layers."""

    inputs = ("observation",)

    def __init__(self, height: int, width: int, channels: Sequence[int], features: int) -> None:
        """Build the layers.

        Args:
            height: of the frames, in pixels.
            width: of the frames, in pixels.
            channels: output channels of the three convolutions (k8 s4, k4 s2, k3 s1).
            features: size of both linear layers, and of the feature vector.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, (kernel, stride) in zip((3, *channels), channels, KERNELS, strict=False):
            layers += [nn.Conv2d(before, after, kernel, stride), nn.ReLU()]
        flat = channels[-1] * convolved_sizes(height)[-1] * convolved_sizes(width)[-1]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(),
            nn.Linear(flat, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU(),
        )  # fmt: skip
        self.features = features
        self.forms = {"observation": ("uint8", (3, height, width))}
        orthogonal(self, TRUNK_GAIN)

    def forward(self, observation: Tensor) -> Tensor:
        """Return (B, features) of frames (B, 3, H, W) uint8."""
        features: Tensor = self.layers(to_float(observation))
        return features


class VectorTrunk(Trunk):
    """Two tanh layers on an observation vector, as is usual for PPO on classic control tasks."""

    inputs = ("observation",)

    def __init__(self, size: int, features: int = 64) -> None:
        """Build the layers.

        Args:
            size: length of the observation vector.
            features: size of both layers, and of the feature vector.
        """
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, features), nn.Tanh(), nn.Linear(features, features), nn.Tanh())
        self.features = features
        self.forms = {"observation": ("float32", (size,))}
        orthogonal(self, TRUNK_GAIN)

    def forward(self, observation: Tensor) -> Tensor:
        """Return (B, features) of vectors (B, size) float32."""
        features: Tensor = self.layers(observation)
        return features


class MemoryTrunk(Trunk):
    """Combines what is seen, the embedding, with what is remembered, the hidden state of the forward dynamics."""

    inputs = ("embedding", "hidden")

    def __init__(self, embedding: int, hidden_shape: Sequence[int], features: int = 512) -> None:
        """Build the layers.

        Args:
            embedding: Z, the size of z.
            hidden_shape: (depth, W) of one hidden state, complex64, e.g. (4, 512).
            features: size of the feature vector.
        """
        super().__init__()
        remembered = 2 * math.prod(hidden_shape)
        self.seen = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, features))
        self.remembered = nn.Sequential(nn.LayerNorm(remembered), nn.Linear(remembered, features, bias=False))
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(features, features), nn.ReLU())
        self.features = features
        self.forms = {"embedding": ("float32", (embedding,)), "hidden": ("complex64", tuple(hidden_shape))}
        orthogonal(self, TRUNK_GAIN)

    def forward(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """Return (B, features) of embeddings (B, Z) float32 and hidden states (B, depth, W) complex64."""
        features: Tensor = self.layers(self.seen(embedding) + self.remembered(torch.view_as_real(hidden).flatten(1)))
        return features


class SeparateTrunks(Trunk):
    """One trunk for the policy and another of the same kind for the value, side by side."""

    def __init__(self, policy: Trunk, value: Trunk) -> None:
        super().__init__()
        if policy.inputs != value.inputs:
            raise ValueError(f"policy takes {policy.inputs}, value takes {value.inputs}: they must be the same")
        self.policy, self.value = policy, value
        self.inputs, self.features, self.forms = policy.inputs, policy.features, policy.forms

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features for the policy and those for the value."""
        return self.policy(*inputs), self.value(*inputs)


class PolicyValueCommonNet(nn.Module):
    """π(a | inputs) and V(inputs). Orthogonal initialisation: √2 trunk, 0.01 policy, 1 value (Engstrom et al. 2020)."""

    def __init__(self, trunk: Trunk, choices: Sequence[int]) -> None:
        """Add the heads to a trunk and initialise all weights.

        Args:
            trunk: the shared layers, or SeparateTrunks.
            choices: number of choices of each action dimension.
        """
        super().__init__()
        self.trunk, self.choices = trunk, tuple(choices)
        self.inputs, self.forms = trunk.inputs, getattr(trunk, "forms", {})
        of_value = trunk.value if isinstance(trunk, SeparateTrunks) else trunk
        self.policy_head = nn.Linear(trunk.features, sum(choices), bias=False)
        self.value_head = nn.Linear(of_value.features, 1)
        orthogonal(self.policy_head, POLICY_GAIN)
        orthogonal(self.value_head, VALUE_GAIN)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of all dimensions' choices, concatenated (B, sum(choices)), and the values (B,)."""
        features = self.trunk(*inputs)
        for_policy, for_value = features if isinstance(features, tuple) else (features, features)
        if not torch.is_autocast_enabled(for_policy.device.type):
            return self.policy_head(for_policy), self.value_head(for_value).squeeze(-1)
        with torch.autocast(for_policy.device.type, enabled=False):  # the body acted on unrounded logits
            return self.policy_head(for_policy.float()), self.value_head(for_value.float()).squeeze(-1)


class MultiCategorical:
    """The joint distribution of independent categorical action dimensions, given their concatenated logits."""

    def __init__(self, logits: Tensor, choices: Sequence[int]) -> None:
        """Split the logits by dimension.

        Args:
            logits: (B, sum(choices)) float.
            choices: number of choices of each action dimension.
        """
        if logits.ndim != 2 or logits.shape[1] != sum(choices):
            raise ValueError(f"logits {tuple(logits.shape)} do not fit choices {tuple(choices)}")
        self._log_probs = [F.log_softmax(part, dim=1) for part in torch.split(logits.float(), list(choices), dim=1)]

    def log_probs(self, actions: Tensor) -> Tensor:
        """Return the log-probability of each dimension's choice, (B, A), of actions (B, A) int64."""
        expected = (len(self._log_probs[0]), len(self._log_probs))
        if actions.shape != expected:
            raise ValueError(f"actions {tuple(actions.shape)} are not {expected}")
        parts = [part.gather(1, actions[:, i : i + 1]) for i, part in enumerate(self._log_probs)]
        return torch.cat(parts, dim=1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return the log-probability of the joint action, (B,): the sum over the dimensions."""
        return self.log_probs(actions).sum(dim=1)

    def entropy(self) -> Tensor:
        """Return the entropy of the joint distribution in nats, (B,): the sum over the dimensions."""
        return torch.stack([-(part.exp() * part).sum(dim=1) for part in self._log_probs]).sum(dim=0)


def orthogonal(module: nn.Module, gain: float) -> None:
    """Initialise all linear and convolutional weights orthogonally, and biases with 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.orthogonal_(part.weight, gain)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
