"""Curiosity: rewards computed from how badly the agent predicted what it then observed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ami_inference.rewards.reward import Stateless, Transition, check_finite
from ami_shared.errors import ConfigurationError

SMALLEST_DEVIATION = 1e-8
SETTLED_AFTER, OUTLIER = 1_000, 10.0  # steps; deviations: the largest contribution of one step to the scale


def surprise_of(transition: Transition) -> float:
    """Return the transition's surprise; raise ConfigurationError if nothing was predicted."""
    if transition.surprise is None:
        raise ConfigurationError("inference.agent.reward: curiosity needs the model forward_dynamics")
    return transition.surprise


class PredictionError(Stateless):
    """The raw prediction error times `scale` plus `shift`: the reference's reward (Pathak et al. 2017)."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0) -> None:
        check_finite(scale=scale, shift=shift)
        self._scale, self._shift = scale, shift

    def reward(self, transition: Transition) -> float:
        return self._scale * surprise_of(transition) + self._shift


class NormalisedPredictionError:
    """The prediction error divided by the running standard deviation of its discounted sum (Burda et al. 2018).

    The sum continues across segments, as in the paper: it serves to normalise the scale, and is not a return.
    Unlike in the paper, the deviation forgets: over months, errors become much smaller than in the first minutes.
    """

    def __init__(self, discount: float = 0.99, clip: float = 5.0, memory_steps: float | None = 10_000.0) -> None:
        """Start without statistics.

        Args:
            discount: of the running sum, in [0, 1).
            clip: largest reward, in standard deviations.
            memory_steps: time constant of the deviation in steps; None = all steps count the same.

        Raises:
            ConfigurationError: a value is out of range.
        """
        check_finite(discount=discount, clip=clip, **({} if memory_steps is None else {"memory_steps": memory_steps}))
        if not 0 <= discount < 1 or not clip > 0 or (memory_steps is not None and not memory_steps >= 2):
            raise ConfigurationError(
                f"inference.agent.reward: discount={discount} must be in [0, 1), clip={clip} above 0, "
                f"memory_steps={memory_steps} 2 or more"
            )
        self._discount, self._clip = discount, clip
        self._memory_steps = math.inf if memory_steps is None else float(memory_steps)
        self._sum = 0.0
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def begin_segment(self) -> None:
        """Do nothing: the scale is kept."""

    def reward(self, transition: Transition) -> float:
        surprise = surprise_of(transition)
        if not math.isfinite(surprise):
            return surprise  # not finite: the caller counts it; it must not enter the statistics
        most = OUTLIER * self.deviation if self._count >= SETTLED_AFTER else math.inf
        self._sum = self._discount * self._sum + max(-most, min(surprise, most))
        self._take(self._sum)
        return min(surprise / self.deviation, self._clip)

    def _take(self, value: float) -> None:
        """Update mean and variance (Welford 1962), exponentially weighted once the memory is full."""
        self._count += 1
        share = 1.0 / min(self._count, self._memory_steps)
        distance = value - self._mean
        self._mean += share * distance
        self._variance = (1.0 - share) * (self._variance + share * distance * distance)

    @property
    def deviation(self) -> float:
        """The standard deviation so far; before there is one, the magnitude of the values."""
        if self._count < 2 or self._variance <= 0.0:
            return max(abs(self._mean), SMALLEST_DEVIATION)
        return max(math.sqrt(self._variance), SMALLEST_DEVIATION)

    def state(self) -> Mapping[str, Any]:
        return {"sum": self._sum, "count": self._count, "mean": self._mean, "variance": self._variance}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sum, self._count = float(state["sum"]), int(state["count"])
        self._mean, self._variance = float(state["mean"]), float(state["variance"])


class LearningProgress:
    """The drop of the prediction error: its slow running mean minus its fast one (Oudeyer et al. 2007).

    The error of noise, which cannot be learned, does not drop, so noise yields no reward.
    """

    def __init__(self, fast_steps: float = 20.0, slow_steps: float = 200.0, scale: float = 1.0) -> None:
        """Start without a mean.

        Args:
            fast_steps: time constant of the fast running mean, in steps.
            slow_steps: time constant of the slow running mean, in steps.
            scale: factor of the reward.

        Raises:
            ConfigurationError: a value is out of range.
        """
        check_finite(fast_steps=fast_steps, slow_steps=slow_steps, scale=scale)
        if not 1 <= fast_steps < slow_steps:
            raise ConfigurationError(
                f"inference.agent.reward: 1 <= fast_steps={fast_steps} < slow_steps={slow_steps} is needed"
            )
        self._rates = (1.0 / fast_steps, 1.0 / slow_steps)
        self._scale = scale
        self._means: tuple[float, float] | None = None

    def begin_segment(self) -> None:
        """Do nothing: progress is measured across segments."""

    def reward(self, transition: Transition) -> float:
        surprise = surprise_of(transition)
        if not math.isfinite(surprise):
            return surprise
        fast, slow = self._means or (surprise, surprise)
        fast += self._rates[0] * (surprise - fast)
        slow += self._rates[1] * (surprise - slow)
        self._means = (fast, slow)
        return self._scale * (slow - fast)

    def state(self) -> Mapping[str, Any]:
        return {"means": list(self._means) if self._means else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._means = (float(state["means"][0]), float(state["means"][1])) if state["means"] else None
