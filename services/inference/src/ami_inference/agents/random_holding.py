"""Encodes what it observes, and acts at random, holding each choice for a while: simple, but a good explorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ami_inference.agents.agent import Decision, explained
from ami_inference.sensors.sensor import Observation
from ami_shared.errors import ConfigurationError, WireError
from ami_shared.models.replicas import Replicas


class RandomHoldingAgent:
    """Each action dimension keeps its choice for a random time, then draws one, which may be the same.

    The times are geometric, so that at every step each dimension redraws with the same probability.
    """

    def __init__(
        self, replicas: Replicas, choices: Sequence[int], mean_hold_steps: float = 10.0, seed: int = 0
    ) -> None:
        """Start by drawing a choice for every dimension.

        Args:
            replicas: holds the replica `image_encoder`.
            choices: number of choices of each action dimension.
            mean_hold_steps: mean number of steps between two draws of a choice; 1 = one at every step.
            seed: of the random choices.

        Raises:
            ConfigurationError: mean_hold_steps is less than 1.
        """
        if not mean_hold_steps >= 1:
            raise ConfigurationError(f"inference.agent.mean_hold_steps={mean_hold_steps} must be 1 or more")
        self._replicas = replicas
        self._choices = np.array(choices, np.int64)
        self._redraw_probability = 1.0 / mean_hold_steps
        self._random = np.random.default_rng(seed)
        self._action = self._random.integers(self._choices)
        self._fits = False

    def begin_segment(self) -> None:
        """Do nothing: actions are held across interruptions."""

    def step(self, observation: Observation) -> Decision:
        """Encode an image (3, H, W) uint8, and return the held choices (A,) int64, some of them redrawn.

        Raises:
            ConfigurationError: the encoder does not fit the observation.
        """
        with explained(observation, self._fits):
            embedding = self._encode(observation)
        self._fits = True
        redraw = self._random.random(len(self._choices)) < self._redraw_probability
        self._action = np.where(redraw, self._random.integers(self._choices), self._action)
        record = {"observation": observation.values, "embedding": embedding, "action": self._action}
        return Decision(self._action, record)

    def state(self) -> Mapping[str, Any]:
        return {"action": self._action, "random": self._random.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["action"].shape != self._choices.shape or (state["action"] >= self._choices).any():
            raise WireError(f"actions {state['action'].tolist()} are not within the choices {self._choices.tolist()}")
        self._action = np.array(state["action"])
        self._random.bit_generator.state = state["random"]

    def metrics(self) -> Mapping[str, float]:
        return {}

    def statistics(self) -> Mapping[str, Any]:
        return {}

    @torch.inference_mode()
    def _encode(self, observation: Observation) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        frame = torch.from_numpy(observation.values).unsqueeze(0).to(self._replicas.device)
        return np.asarray(self._replicas["image_encoder"](frame)[0].cpu().numpy(), np.float32)
