"""The curious agent: observes, is surprised, decides, and predicts what it will observe next.

What connects one step with the next (the prediction, the hidden state) is kept here; a record contains only what
trainers need. The configuration determines which models an agent has: with a policy alone it is a plain PPO agent.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ami_inference.agents.agent import Decision, explained
from ami_inference.rewards.reward import RewardModule, Transition
from ami_inference.sensors.sensor import Observation
from ami_shared.errors import ConfigurationError, NotFiniteError, WireError
from ami_shared.models.dynamics import negative_log_density
from ami_shared.models.replicas import Replicas
from ami_shared.state import Restorable, restore_each, state_of
from ami_shared.wire import Array

log = logging.getLogger(__name__)

ENCODER, DYNAMICS, POLICY = "image_encoder", "forward_dynamics", "policy_value"
NO_REWARD: Mapping[str, Array] = {"reward": np.asarray(0.0, np.float32), "rewarded": np.asarray(False)}


class CuriosityAgent:
    """Encode → reward of the step before → act → predict."""

    def __init__(self, replicas: Replicas, choices: Sequence[int], reward: RewardModule, seed: int = 0) -> None:
        """Check that the models fit each other and the environment.

        Args:
            replicas: the policy, and optionally the encoder and the forward dynamics.
            choices: number of choices of each action dimension.
            reward: rates each transition.
            seed: of the random choices.

        Raises:
            ConfigurationError: models are missing, or do not fit the environment's choices.
        """
        self._replicas, self._reward = replicas, reward
        self._choices = tuple(int(n) for n in choices)
        self._sees, self._predicts = ENCODER in replicas, DYNAMICS in replicas
        self._check(replicas)
        self._offsets = np.cumsum((0, *self._choices[:-1]))
        self._random = np.random.default_rng(seed)
        self._prediction: Tensor | None = None
        self._hidden = replicas[DYNAMICS].initial_hidden(1) if self._predicts else None  # type: ignore[operator]
        self._acted, self._sighted, self._fits = False, True, False
        self.not_finite = 0
        self._sums: dict[str, tuple[float, int]] = {}

    def _check(self, replicas: Replicas) -> None:
        if POLICY not in replicas:
            raise ConfigurationError(f"inference.agent.models: {POLICY} is missing")
        if self._predicts and not self._sees:
            raise ConfigurationError(f"inference.agent.models: {DYNAMICS} needs {ENCODER}")
        for name in (POLICY, DYNAMICS) if self._predicts else (POLICY,):
            theirs = tuple(replicas[name].choices)  # type: ignore[arg-type]
            if theirs != self._choices:
                raise ConfigurationError(
                    f"models.{name}: choices {theirs} do not fit the environment's {self._choices}: set action.choices"
                )
        has = {"observation": True, "embedding": self._sees, "hidden": self._predicts}
        missing = [name for name in replicas[POLICY].inputs if not has.get(name)]  # type: ignore[union-attr]
        if missing:
            raise ConfigurationError(
                f"policy_input: the policy needs {', '.join(missing)}: add the models for it to inference.agent.models"
            )

    def begin_segment(self) -> None:
        """Drop the prediction and the last action; the hidden state is kept, except after an episode's end."""
        self._prediction, self._acted = None, False
        self._reward.begin_segment()

    def step(self, observation: Observation) -> Decision:
        """Reward the last step, choose an action, and predict the next embedding.

        Args:
            observation: its values are an image (3, H, W) uint8, or a vector (D,) float32.

        Returns:
            The action, (A,) int64, and the record: observation, action, log_probs (A,), log_prob, value, reward and
            rewarded, and with the models for them embedding (Z,) float32 and hidden (depth, W) complex64.

        Raises:
            NotFiniteError: the observation is not finite.
            ConfigurationError: the models do not fit the observation.
        """
        with explained(observation, self._fits):
            decision = self._step(observation)
        self._fits = True
        return decision

    @torch.inference_mode()
    def _step(self, observation: Observation) -> Decision:
        values = observation.values
        if values.dtype != np.uint8 and not np.isfinite(values).all():
            raise NotFiniteError("the observation is not finite")
        if observation.beginning:
            self._forget()
        inputs: dict[str, Tensor] = {"observation": self._tensor(values).unsqueeze(0)}
        record: dict[str, Array] = {"observation": values}
        if self._sees:
            inputs["embedding"] = self._encode(inputs["observation"])
            record["embedding"] = inputs["embedding"][0].cpu().numpy()
        record |= self._judge(observation, inputs.get("embedding"))
        if self._hidden is not None:
            inputs["hidden"] = self._hidden
            record["hidden"] = self._hidden[0].cpu().numpy()
        action, decided = self._decide(inputs)
        record |= decided
        if observation.ending:
            self._forget()
        else:
            self._predict(inputs, action)
        return Decision(action, record)

    def _tensor(self, array: Array) -> Tensor:
        """Return an array as a tensor on the models' device."""
        return torch.from_numpy(array).to(self._replicas.device)

    def _encode(self, observation: Tensor) -> Tensor:
        embedding: Tensor = self._replicas[ENCODER](observation)
        self._sighted = bool(embedding.isfinite().all())
        if not self._sighted:
            self._count_not_finite("the embedding")
        return embedding if self._sighted else torch.zeros_like(embedding)

    def _judge(self, observation: Observation, embedding: Tensor | None) -> Mapping[str, Array]:
        """Return the reward of the previous step, if there was one in this segment."""
        if not self._acted:
            return NO_REWARD
        surprise = None
        if self._predicts:
            if self._prediction is None or embedding is None or not self._sighted:  # something was not finite
                return NO_REWARD
            surprise = negative_log_density(self._prediction, embedding).mean().item()
            if not math.isfinite(surprise):
                self._count_not_finite("the surprise")
                return NO_REWARD
            self._note("surprise", surprise)
        with np.errstate(over="ignore"):
            reward = float(np.float32(self._reward.reward(Transition(surprise, observation.reward))))
        if not math.isfinite(reward):
            self._count_not_finite("the reward")
            return NO_REWARD
        self._note("reward", reward)
        return {"reward": np.asarray(reward, np.float32), "rewarded": np.asarray(True)}

    def _count_not_finite(self, what: str) -> None:
        """Count and log it once: a bad snapshot must neither end the agent nor persist in its state."""
        self.not_finite += 1
        if self.not_finite == 1:
            log.warning("%s is not finite: no reward for this step", what)

    def _decide(self, inputs: Mapping[str, Tensor]) -> tuple[Array, dict[str, Array]]:
        """Sample one choice per dimension (Gumbel-max trick)."""
        policy = self._replicas[POLICY]
        logits, values = policy(*(inputs[name] for name in policy.inputs))  # type: ignore[union-attr]
        scores, value = logits[0].float().cpu().numpy(), float(values)
        self._acted = bool(np.isfinite(scores).all()) and math.isfinite(value)
        if not self._acted:
            return self._stand_still()
        normalisers = np.logaddexp.reduceat(scores, self._offsets)
        log_probs = scores - np.repeat(normalisers, self._choices)
        perturbed = log_probs + self._random.gumbel(size=len(log_probs))
        action = np.array(
            [int(part.argmax()) for part in np.split(perturbed, self._offsets[1:])],
            np.int64,
        )
        chosen = log_probs[self._offsets + action]
        self._note("entropy", float(-(np.exp(log_probs) * log_probs).sum()))
        self._note("value", value)
        decided = {
            "action": action,
            "log_probs": chosen.astype(np.float32),
            "log_prob": np.asarray(chosen.sum(), np.float32),
            "value": np.asarray(value, np.float32),
        }
        return action, decided

    def _stand_still(self) -> tuple[Array, dict[str, Array]]:
        """Act if the policy is not finite: neither this step nor the previous one can be learned from."""
        self._count_not_finite("the policy")
        action, certain = np.zeros(len(self._choices), np.int64), np.zeros(len(self._choices), np.float32)
        zero = np.asarray(0.0, np.float32)
        return action, {"action": action, "log_probs": certain, "log_prob": zero, "value": zero, **NO_REWARD}

    def _predict(self, inputs: Mapping[str, Tensor], action: Array) -> None:
        if self._hidden is None:
            return
        if not self._sighted:
            self._forget()
            return
        dynamics = self._replicas[DYNAMICS]
        taken = self._tensor(action).unsqueeze(0)
        self._prediction, self._hidden = dynamics.step(inputs["embedding"], self._hidden, taken)  # type: ignore[operator]
        if self._prediction.shape != inputs["embedding"].shape:
            said, seen = tuple(self._prediction.shape), tuple(inputs["embedding"].shape)
            raise ValueError(f"the forward dynamics predicts {said} of an embedding {seen}")
        if not (self._prediction.isfinite().all() and self._hidden.isfinite().all()):
            self._count_not_finite("the prediction")
            self._forget()

    def _forget(self) -> None:
        """Reset the hidden state: an episode has ended, or it is not finite."""
        self._prediction = None
        if self._predicts:
            self._hidden = self._replicas[DYNAMICS].initial_hidden(1)  # type: ignore[operator]

    def _note(self, name: str, value: float) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, count + 1)

    def state(self) -> Mapping[str, Any]:
        remembered = {"hidden": self._hidden, "prediction": self._prediction}
        return {
            "tensors": {name: tensor.cpu().numpy() for name, tensor in remembered.items() if tensor is not None},
            "acted": self._acted,
            "sighted": self._sighted,
            "random": self._random.bit_generator.state,
            "reward": dict(state_of(self._reward)),
            "not_finite": self.not_finite,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the state of an earlier process.

        Raises:
            WireError: a part does not fit; the rest has been restored.
        """
        self._acted, self._sighted = bool(state["acted"]), bool(state["sighted"])
        self._random.bit_generator.state = state["random"]
        self.not_finite = int(state["not_finite"])
        tensors = {name: self._tensor(np.array(array)) for name, array in state["tensors"].items()}
        hidden = tensors.get("hidden")
        fits = getattr(hidden, "shape", None) == getattr(self._hidden, "shape", None)
        if fits:
            self._hidden, self._prediction = hidden, tensors.get("prediction")
        restore_each({"reward": Restorable(self._reward)}, state)
        if not fits:
            raise WireError("the hidden state does not fit the forward dynamics")

    def metrics(self) -> Mapping[str, float]:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def statistics(self) -> Mapping[str, Any]:
        return {"not_finite": self.not_finite}
