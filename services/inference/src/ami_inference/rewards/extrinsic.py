"""The environment's reward."""

from __future__ import annotations

from ami_inference.rewards.reward import Stateless, Transition, check_finite
from ami_shared.errors import ConfigurationError


class ExtrinsicReward(Stateless):
    """The environment's own reward, times a scale."""

    def __init__(self, scale: float = 1.0) -> None:
        check_finite(scale=scale)
        self._scale = scale

    def reward(self, transition: Transition) -> float:
        if transition.extrinsic is None:
            raise ConfigurationError(
                "inference.agent.reward: this environment provides no reward; choose a curiosity reward"
            )
        return self._scale * transition.extrinsic
