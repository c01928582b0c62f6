"""Generalised advantage estimation (Schulman et al. 2016) over a stretch of one body's records."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ami_shared.records import Ending
from ami_shared.wire import Array

LARGEST = 1e15  # the largest usable return or advantage: losses square them in float32


@dataclass(frozen=True)
class Advantages:
    """Advantages and returns of T records, all but the last of a stretch.

    Attributes:
        usable: (T,) bool: whether the record's action was carried out, reward and values are known and finite, and
            the results are no larger than LARGEST.
        advantages: (T,) float32; 0 if the reward or a value is unknown or not finite.
        returns: (T,) float32: advantage + value.
    """

    usable: Array
    advantages: Array
    returns: Array


def generalised_advantages(
    rewards: Array, rewarded: Array, values: Array, endings: Array, follows: Array, discount: float, decay: float
) -> Advantages:
    """Compute δ_t = r_{t+1} + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}, within segments.

    An interrupted segment is bootstrapped with the value of its last record, a terminated episode with 0.

    Args:
        rewards: (T+1,) float32; rewards[t] came with record t and belongs to the action of record t−1.
        rewarded: (T+1,) bool: whether the reward exists.
        values: (T+1,) float32, as computed when the body acted.
        endings: (T+1,) uint8, see Ending.
        follows: (T+1,) bool: whether the record continues the segment of the previous one.
        discount: γ.
        decay: λ.

    Raises:
        ValueError: the shapes differ.
    """
    shapes = {array.shape for array in (rewards, rewarded, values, endings, follows)}
    if len(shapes) != 1 or rewards.ndim != 1 or len(rewards) < 2:
        raise ValueError(f"rewards, values and flags must be of one shape (T+1,), not {sorted(shapes)}")
    next_values = np.where(endings[1:] == Ending.TERMINATED, 0.0, values[1:])
    with np.errstate(invalid="ignore"):
        deltas = rewards[1:] + discount * next_values - values[:-1]
    usable = follows[1:] & rewarded[1:] & (endings[:-1] == Ending.NONE) & np.isfinite(deltas)
    advantages = np.zeros(len(deltas), np.float64)
    later = 0.0
    for t in reversed(range(len(deltas))):
        later = float(deltas[t]) + discount * decay * later if usable[t] else 0.0
        advantages[t] = later
    returns = advantages + values[:-1]
    usable &= (np.abs(advantages) < LARGEST) & (np.abs(returns) < LARGEST)
    with np.errstate(over="ignore"):
        return Advantages(usable, advantages.astype(np.float32), returns.astype(np.float32))
