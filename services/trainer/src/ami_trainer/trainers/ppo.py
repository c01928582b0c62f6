"""Trains policy and value by proximal policy optimisation (Schulman et al. 2017) on whole rollouts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ami_shared.errors import ConfigurationError, WireError
from ami_shared.models.policy_value import PolicyValueCommonNet
from ami_shared.records import RecordBatch
from ami_shared.snapshots import digest
from ami_shared.state import restore_each
from ami_shared.wire import Array
from ami_trainer.advantages import generalised_advantages
from ami_trainer.buffers.columns import form
from ami_trainer.buffers.rollout import Rollout, RolloutBuffer, most_in_a_batch
from ami_trainer.compute import Compute
from ami_trainer.data_parallel import Batch, Losses, Team
from ami_trainer.optimisation import GuardedOptimiser, fused_if_possible
from ami_trainer.policy_age import PolicyAge
from ami_trainer.ppo_loss import LossWeights, Minibatch, explained_variance, ppo_loss
from ami_trainer.settings import check_counts, check_numbers, check_positive, given
from ami_trainer.trainers.trainer import PlainTrainer

MODEL = "policy_value"
MOST_WAITING = 32  # rollouts of a body
COUNTERS = ("used", "unusable", "stale", "updates")
ACTED = {name: form(np.float32) for name in ("log_prob", "value", "reward")} | {"rewarded": form(np.bool_)}


@dataclass(frozen=True)
class Lesson:
    """Steps to learn from: the policy's inputs, actions and outputs, (N, …) each; advantages, returns (N,) float32."""

    columns: Mapping[str, Array]
    advantages: Array
    returns: Array

    @classmethod
    def of_all(cls, lessons: Sequence[Lesson]) -> Lesson:
        """Return several lessons as one, in their order."""
        columns = {name: np.concatenate([lesson.columns[name] for lesson in lessons]) for name in lessons[0].columns}
        advantages, returns = ([getattr(lesson, name) for lesson in lessons] for name in ("advantages", "returns"))
        return cls(columns, np.concatenate(advantages), np.concatenate(returns))


class PPOTrainer(PlainTrainer):
    """Learns in a few passes from one waiting rollout of each body, together; then they are discarded."""

    def __init__(
        self,
        policy: PolicyValueCommonNet,
        rollout_length: int = 128,
        epochs: int = 3,
        batch_size: int = 32,
        learning_rate: float = 1e-4,
        learning_rate_steps: int | None = None,
        discount: float = 0.99,
        gae_decay: float = 0.95,
        clip: float = 0.1,
        value_clip: float | None = None,
        value_weight: float = 0.5,
        entropy_weight: float = 0.01,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 0.5,
        target_kl: float | None = 0.03,
        normalise_advantages: str = "rollout",
        max_policy_lag: int = 10,
        device: str = "cpu",
        precision: str = "float32",
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        """Check the settings and create buffer and optimiser.

        Args:
            policy: the model to train.
            rollout_length: steps in a rollout.
            epochs: passes over the rollouts that are learned from together.
            batch_size: steps in a minibatch.
            learning_rate: of AdamW.
            learning_rate_steps: records after which the learning rate has fallen linearly to 0; None = it is constant.
            discount: γ.
            gae_decay: λ.
            clip: see LossWeights.
            value_clip: see LossWeights.
            value_weight: weight of the value loss.
            entropy_weight: weight of the entropy.
            weight_decay: of AdamW.
            max_grad_norm: gradients are clipped to this norm; None = not at all.
            target_kl: no further pass once the approximate KL to the policy that acted exceeds it; None = all passes.
            normalise_advantages: `rollout`: over the rollouts that are learned from together; or `minibatch`.
            max_policy_lag: a rollout is dropped and counted if the policy has learned more often than this since it
                acted in the rollout's oldest record.
            device: see Compute.
            precision: see Compute.
            compile: see Compute.
            seed: of the order of steps.

        Raises:
            ConfigurationError: a value is out of range.
        """
        check_counts(rollout_length=rollout_length, epochs=epochs, batch_size=batch_size, max_policy_lag=max_policy_lag)
        check_numbers(learning_rate=learning_rate, value_weight=value_weight, entropy_weight=entropy_weight)
        check_numbers(weight_decay=weight_decay, **given(value_clip=value_clip, target_kl=target_kl))
        check_positive(clip=clip, **given(max_grad_norm=max_grad_norm))
        check_numbers(most=1.0, discount=discount, gae_decay=gae_decay)
        check_counts(**given(learning_rate_steps=learning_rate_steps))
        if normalise_advantages not in ("rollout", "minibatch"):
            raise ConfigurationError(
                f"trainers.NAME.normalise_advantages={normalise_advantages!r} must be rollout or minibatch"
            )
        if normalise_advantages == "minibatch" and batch_size == 1:
            raise ConfigurationError("trainers.NAME.batch_size=1: advantages cannot be normalised over one step")
        self._compute = Compute(device, precision, compile)
        self._policy = self._compute.place(policy)
        self._length, self._epochs, self._batch_size = rollout_length, epochs, batch_size
        self._discount, self._decay = discount, gae_decay
        self._weights = LossWeights(clip, value_weight, entropy_weight, value_clip)
        self._target_kl, self._normalise = target_kl, normalise_advantages
        self._adam = torch.optim.AdamW(
            policy.parameters(), learning_rate, weight_decay=weight_decay, eps=1e-5, fused=fused_if_possible(policy)
        )
        self._optimiser = GuardedOptimiser({MODEL: policy}, self._adam, max_grad_norm)
        self._learning_rate, self._rate_steps = learning_rate, learning_rate_steps
        usable = min(max_policy_lag + 1, MOST_WAITING)  # of those that wait for one another, the next is too old
        self._buffer = RolloutBuffer(rollout_length, max(usable, most_in_a_batch(rollout_length)))
        forms: Mapping[str, tuple[str, tuple[int, ...]]] = getattr(policy, "forms", {})
        known = {name: form(np.dtype(dtype).type, *shape) for name, (dtype, shape) in forms.items()}
        self._buffer.require((*policy.inputs, "action", *ACTED), {**known, **ACTED}, policy.choices)
        self._random = np.random.default_rng(seed)
        self._age = PolicyAge(max_policy_lag, self._digest)
        self._metrics: dict[str, float] = {}
        self._policy_lag = 0.0
        self.used = self.unusable = self.stale = self.updates = 0

    @property
    def published_models(self) -> Mapping[str, nn.Module]:
        return {MODEL: self._policy}

    @property
    def history(self) -> int:
        return 0  # records of older policies are useless to this one

    def in_lockstep(self) -> None:
        self._buffer.keep_all()

    def share(self, team: Team) -> None:
        self._optimiser.share(team, self._losses)

    def published(self, versions: Mapping[str, int]) -> None:
        self._age.publish(versions[MODEL])

    def consume(self, batch: RecordBatch, continues: bool) -> None:
        self._buffer.add(batch, continues, MODEL)

    def is_trainable(self) -> bool:
        return self._buffer.ready()

    def train(self) -> Iterator[Mapping[str, float]]:
        taken = self._buffer.take()
        self._policy_lag = self._mean_lag(taken)
        try:
            rollouts = [rollout for rollout in taken if not self._age.is_stale(rollout.versions)]
            self.stale += self._length * (len(taken) - len(rollouts))
            if rollouts:
                yield from self._learn(rollouts)
        finally:
            self._buffer.release()

    def _learn(self, rollouts: Sequence[Rollout]) -> Iterator[Mapping[str, float]]:
        about = self._about(rollouts)
        lessons = [self._lesson(rollout) for rollout in rollouts]
        usable = sum(len(lesson.returns) for lesson in lessons)
        self.unusable += self._length * len(rollouts) - usable
        self.used += usable
        if not usable:
            return
        self._age.learn()
        lesson = Lesson.of_all(lessons)
        about["explained_variance"] = explained_variance(lesson.columns["value"], lesson.returns)
        self._anneal()
        data = self._on_device(lesson)
        for _ in range(self._epochs):
            divergences = []
            for chosen in self._shuffled(usable):
                metrics = self._gradient_step(data, chosen)
                if not metrics["skipped"]:
                    divergences.append(metrics["approx_kl"])
                yield metrics | about
            if self._target_kl is not None and divergences and np.mean(divergences) > self._target_kl:
                return

    def _anneal(self) -> None:
        if self._rate_steps is not None:
            left = max(0.0, 1.0 - self._buffer.records / self._rate_steps)
            for group in self._adam.param_groups:
                group["lr"] = self._learning_rate * left

    def _about(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        rewards = np.concatenate([r.columns["reward"][1:][r.columns["rewarded"][1:]] for r in rollouts])
        rewards = rewards[np.isfinite(rewards)]
        return {
            "policy_lag": self._mean_lag(rollouts),
            "reward_mean": float(rewards.mean()) if len(rewards) else 0.0,
        }

    def _digest(self) -> str:
        """Return a digest of the policy's parameters."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._policy.state_dict().items()}
        return f"{digest(MODEL, 0, arrays):016x}"

    def _mean_lag(self, rollouts: Sequence[Rollout]) -> float:
        return self._age.mean_lag([rollout.versions for rollout in rollouts])

    def _lesson(self, rollout: Rollout) -> Lesson:
        """Return the usable steps of one rollout, with advantages and returns."""
        columns = rollout.columns
        lived = (columns["reward"], columns["rewarded"], columns["value"], rollout.endings, rollout.follows)
        worth = generalised_advantages(*lived, self._discount, self._decay)
        steps = np.flatnonzero(worth.usable & self._finite(rollout))
        used = {name: columns[name][steps] for name in (*self._policy.inputs, "action", "log_prob", "value")}
        return Lesson(used, worth.advantages[steps], worth.returns[steps])

    def _finite(self, rollout: Rollout) -> np.ndarray[Any, Any]:
        """Return for each step, (length,) bool, whether the policy's inputs and outputs were finite."""
        looked_at = (rollout.columns[name][:-1] for name in (*self._policy.inputs, "log_prob"))
        parts = [np.isfinite(column).reshape(self._length, -1).all(axis=1) for column in looked_at]
        finite: np.ndarray[Any, Any] = np.logical_and.reduce(parts)
        return finite

    def _on_device(self, lesson: Lesson) -> Minibatch:
        """Return all steps as tensors, with advantages normalised over them if that is configured."""
        advantages = lesson.advantages
        if self._normalise == "rollout":
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        columns, tensor = lesson.columns, self._compute.tensor
        return Minibatch(
            inputs=tuple(tensor(columns[name]) for name in self._policy.inputs),
            actions=tensor(columns["action"]),
            log_probs=tensor(columns["log_prob"]),
            values=tensor(columns["value"]),
            advantages=tensor(advantages.astype(np.float32)),
            returns=tensor(lesson.returns),
        )

    def _shuffled(self, count: int) -> Iterator[Tensor]:
        """Distribute all steps over minibatches of about the same size; yield their indices, int64."""
        order = self._random.permutation(count)
        parts = max(1, round(count / self._batch_size))
        for part in np.array_split(order, parts):
            yield self._compute.tensor(part)

    def _gradient_step(self, data: Minibatch, chosen: Tensor) -> dict[str, float]:
        begin = time.perf_counter()
        minibatch = data.select(chosen)
        if self._normalise == "minibatch":
            advantages = minibatch.advantages
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
            minibatch = replace(minibatch, advantages=advantages)
        metrics = self._optimiser.step_on(minibatch.tensors(), self._losses)
        self.updates += 1
        metrics["step_time_ms"] = (time.perf_counter() - begin) * 1e3
        self._metrics = metrics
        return metrics

    def _losses(self, batch: Batch) -> Losses:
        self._policy.train()
        with self._compute.autocast():
            return ppo_loss(self._policy, Minibatch.of_tensors(batch), self._weights)

    def state(self) -> Mapping[str, Any]:
        return {
            "buffer": self._buffer.state(),
            "optimiser": self._optimiser.state(),
            "random": self._random.bit_generator.state,
            "counters": {name: getattr(self, name) for name in COUNTERS} | {"learnings": self._age.learnings},
            **self._age.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._random.bit_generator.state = state["random"]
        counters = state["counters"]
        for name in COUNTERS:
            setattr(self, name, int(counters.get(name, 0)))
        learnings = counters.get("learnings") or counters.get("rollouts", 0)  # the latter in older checkpoints
        self._age.restore(state, int(learnings))
        try:
            restore_each({"optimiser": self._optimiser}, state)
        except WireError:
            self._buffer.restore_counts(state["buffer"])  # of a model whose inputs may have had another form
            raise
        restore_each({"buffer": self._buffer}, state)

    def statistics(self) -> Mapping[str, Any]:
        return {
            "updates": self.updates,
            "policy_lag": self._policy_lag,
            "losses": {name: value for name, value in self._metrics.items() if "loss" in name or name == "entropy"},
            "buffer": self._buffer.statistics(),
            "limiter": {
                "used": self.used,
                "unusable": self.unusable,
                "stale": self.stale,
                "overflowed": self._buffer.overflowed,
                **self._optimiser.statistics(),
            },
        }
