"""The loss of proximal policy optimisation (Schulman et al. 2017), and its usual diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ami_shared.models.policy_value import MultiCategorical, PolicyValueCommonNet


@dataclass(frozen=True)
class Minibatch:
    """Steps of a rollout, on the device: inputs of the policy (B, …), actions (B, A) int64, the others (B,) float32."""

    inputs: tuple[Tensor, ...]
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all parts in one tuple, from which of_tensors() makes the minibatch again."""
        return (self.actions, self.log_probs, self.values, self.advantages, self.returns, *self.inputs)

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> Minibatch:
        """Return the minibatch of which these are the tensors()."""
        actions, log_probs, values, advantages, returns, *inputs = tensors
        return cls(tuple(inputs), actions, log_probs, values, advantages, returns)

    def select(self, chosen: Tensor) -> Minibatch:
        """Return the steps with these indices, (B,) int64."""
        return self.of_tensors([tensor[chosen] for tensor in self.tensors()])


@dataclass(frozen=True)
class LossWeights:
    """The weights of the loss's parts, and where they are clipped.

    Attributes:
        clip: largest change of the joint action's probability ratio that lowers the loss.
        value: weight of the value loss.
        entropy: weight of the entropy.
        value_clip: largest change of a value that lowers the loss; None = values are not clipped.
    """

    clip: float
    value: float
    entropy: float
    value_clip: float | None


def ppo_loss(policy: PolicyValueCommonNet, batch: Minibatch, weights: LossWeights) -> dict[str, Tensor]:
    """Return `loss` = policy loss + weighted value loss − weighted entropy, its parts, and diagnostics.

    Raises:
        ValueError: shapes of the minibatch differ.
    """
    logits, values = policy(*batch.inputs)
    distribution = MultiCategorical(logits, policy.choices)
    log_probs, values = distribution.log_prob(batch.actions), values.float()
    shapes = {tuple(t.shape) for t in (log_probs, batch.log_probs, values, batch.returns, batch.advantages)}
    if len(shapes) != 1:
        raise ValueError(f"log-probabilities, values, returns and advantages differ in shape: {sorted(shapes)}")
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - weights.clip, 1 + weights.clip)
    policy_loss = -torch.minimum(batch.advantages * ratio, batch.advantages * clipped).mean()
    errors = (values - batch.returns).square()
    if weights.value_clip is not None:
        near = batch.values + (values - batch.values).clamp(-weights.value_clip, weights.value_clip)
        errors = torch.maximum(errors, (near - batch.returns).square())
    value_loss = 0.5 * errors.mean()
    entropy = distribution.entropy().mean()
    loss = policy_loss + weights.value * value_loss - weights.entropy * entropy
    with torch.no_grad():
        diagnostics = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": ((ratio - 1) - log_ratio).mean(),  # Schulman's third estimator: low variance, never negative
            "clip_fraction": ((ratio - 1).abs() > weights.clip).float().mean(),
        }
    return {"loss": loss, **diagnostics}


def explained_variance(values: np.ndarray[Any, Any], returns: np.ndarray[Any, Any]) -> float:
    """Return 1 − Var(returns − values) / Var(returns): 1 = perfect values, 0 = no better than a constant."""
    variance = float(np.var(returns))
    return 1.0 - float(np.var(returns - values)) / variance if variance > 0 else 0.0
