"""A weighted sum of rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ami_inference.rewards.reward import RewardModule, Transition, check_finite
from ami_shared.errors import ConfigurationError
from ami_shared.state import Restorable, state_of

log = logging.getLogger(__name__)


class RewardMixture:
    """Σ weight · reward; each part keeps its own state."""

    def __init__(self, parts: Sequence[RewardModule], weights: Sequence[float]) -> None:
        if len(parts) != len(weights) or not parts:
            raise ConfigurationError(
                f"inference.agent.reward: {len(parts)} parts need as many weights, not {len(weights)}"
            )
        check_finite(**{f"weights[{n}]": weight for n, weight in enumerate(weights)})
        self._parts, self._weights = list(parts), [float(weight) for weight in weights]

    def begin_segment(self) -> None:
        for part in self._parts:
            part.begin_segment()

    def reward(self, transition: Transition) -> float:
        return sum(w * part.reward(transition) for w, part in zip(self._weights, self._parts, strict=True))

    def state(self) -> Mapping[str, Any]:
        return {"parts": [dict(state_of(part)) for part in self._parts]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if len(state["parts"]) != len(self._parts):
            log.warning("a mixture of %d rewards starts afresh: %d were kept", len(self._parts), len(state["parts"]))
            return
        for part, kept in zip(self._parts, state["parts"], strict=True):
            Restorable(part).restore(kept)
