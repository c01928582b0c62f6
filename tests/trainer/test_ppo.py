from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from experience import batches, record
from torch import Tensor, nn

from ami_shared import limits
from ami_shared.errors import ConfigurationError
from ami_shared.models.policy_value import MultiCategorical, PolicyValueCommonNet, VectorTrunk
from ami_shared.records import Ending, Record
from ami_shared.state import copied
from ami_trainer.ppo_loss import LossWeights, Minibatch, explained_variance, ppo_loss
from ami_trainer.trainers.ppo import PPOTrainer

CHOICES = (3,)
WEIGHTS = LossWeights(clip=0.1, value=0.5, entropy=0.001, value_clip=None)


class Table(nn.Module):
    """A policy that is nothing but its parameters: logits and values of each case."""

    inputs = ("observation",)

    def __init__(self, choices: tuple[int, ...], cases: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choices = choices
        self.logits = nn.Parameter(torch.randn(cases, sum(choices)))
        self.values = nn.Parameter(torch.randn(cases))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits[observation], self.values[observation]


def minibatch(count: int = 6) -> Minibatch:
    torch.manual_seed(1)
    actions = torch.stack([torch.randint(0, 3, (count,)), torch.randint(0, 2, (count,))], dim=1)
    old = torch.randn(count) * 0.3 - 1.8
    return Minibatch(
        (torch.arange(count),), actions, old, torch.randn(count), torch.randn(count) * 2, torch.randn(count)
    )


def by_hand(table: Table, batch: Minibatch, weights: LossWeights) -> Tensor:
    """The loss of one record after the other, from the definition."""
    total = torch.zeros(())
    for n in range(len(batch.actions)):
        parts = [part.softmax(0) for part in table.logits[n].split(list(table.choices))]
        joint = torch.stack([p[a] for p, a in zip(parts, batch.actions[n], strict=True)]).prod()
        ratio = joint / batch.log_probs[n].exp()
        advantage = batch.advantages[n]
        gain = torch.min(advantage * ratio, advantage * ratio.clamp(1 - weights.clip, 1 + weights.clip))
        error = (table.values[n] - batch.returns[n]) ** 2
        if weights.value_clip is not None:
            step = (table.values[n] - batch.values[n]).clamp(-weights.value_clip, weights.value_clip)
            error = torch.max(error, (batch.values[n] + step - batch.returns[n]) ** 2)
        entropy = -sum((p * p.log()).sum() for p in parts)
        total = total - gain + weights.value * 0.5 * error - weights.entropy * entropy
    return total / len(batch.actions)


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_the_joint_loss_and_its_gradient_are_those_of_the_definition(value_clip: float | None) -> None:
    weights = LossWeights(clip=0.2, value=0.7, entropy=0.03, value_clip=value_clip)
    one, other = Table((3, 2), 6), Table((3, 2), 6)
    batch = minibatch()
    metrics = ppo_loss(one, batch, weights)  # type: ignore[arg-type]
    loss = metrics["loss"]
    expected = by_hand(other, batch, weights)
    torch.testing.assert_close(loss, expected)
    assert metrics["clip_fraction"] > 0
    torch.autograd.backward(loss)
    torch.autograd.backward(expected)
    torch.testing.assert_close(one.logits.grad, other.logits.grad)
    torch.testing.assert_close(one.values.grad, other.values.grad)


def test_at_the_policy_that_acted_the_ratio_is_one() -> None:
    table, batch = Table((3, 2), 6), minibatch()
    own = MultiCategorical(table.logits, (3, 2)).log_prob(batch.actions).detach()
    same = Minibatch(batch.inputs, batch.actions, own, batch.values, batch.advantages, batch.returns)
    metrics = ppo_loss(table, same, WEIGHTS)  # type: ignore[arg-type]
    assert metrics["approx_kl"].item() == pytest.approx(0.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["policy_loss"].item() == pytest.approx(-batch.advantages.mean().item(), abs=1e-6)


@pytest.mark.parametrize("name", ["returns", "log_probs", "advantages"])
def test_a_column_among_the_rows_is_refused(name: str) -> None:
    batch = minibatch()
    odd = {field: getattr(batch, field) for field in Minibatch.__dataclass_fields__}
    odd[name] = odd[name].unsqueeze(1)
    with pytest.raises(ValueError, match="shape"):
        ppo_loss(Table((3, 2), 6), Minibatch(**odd), WEIGHTS)  # type: ignore[arg-type]


def trainer(**options: Any) -> PPOTrainer:
    torch.manual_seed(0)
    net = PolicyValueCommonNet(VectorTrunk(2, 8), CHOICES)
    settings = {"rollout_length": 8, "batch_size": 4, "epochs": 2, "learning_rate": 1e-2, **options}
    return PPOTrainer(net, **settings)


def live(made: PPOTrainer, records: list[Record]) -> list[dict[str, float]]:
    """Feed records one batch, and train on whatever is ready."""
    for batch in batches(records):
        made.consume(batch, True)
    metrics = []
    while made.is_trainable():
        metrics += [dict(step) for step in made.train()]
    return metrics


def weights_of(made: PPOTrainer) -> list[Tensor]:
    return [p.detach().clone() for p in made.published_models["policy_value"].parameters()]


def test_every_record_is_used_or_counted() -> None:
    made = trainer()
    lived = [record(n, segment=n // 5, ending=Ending.TERMINATED if n % 5 == 4 else Ending.NONE,
                    rewarded=np.asarray(n % 5 > 0)) for n in range(42)]  # fmt: skip
    for begin in range(0, 42, 7):
        live(made, lived[begin : begin + 7])
    limiter, fill = made.statistics()["limiter"], made.statistics()["buffer"]["fill"]
    assert limiter["used"] == 32  # of five records of an episode, four acted
    assert limiter["unusable"] == 8
    assert fill == 2
    assert limiter["overflowed"] == limiter["stale"] == 0


def test_what_comes_faster_than_it_is_learned_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCH_RECORDS", 8)
    made = trainer(max_policy_lag=1)
    live(made, [record(n) for n in range(42)])  # five rollouts at once, of which two wait
    limiter = made.statistics()["limiter"]
    assert limiter["used"] + limiter["unusable"] == 16
    assert limiter["overflowed"] == 24


def test_after_an_absence_all_that_is_not_too_old_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the trainer was away, the body went on with the policy that it had."""
    monkeypatch.setattr(limits, "BATCH_RECORDS", 8)
    made = trainer(max_policy_lag=5)
    made.published({"policy_value": 1})
    live(made, [record(n, version=1) for n in range(6 * 8 + 1)])
    limiter = made.statistics()["limiter"]
    assert (limiter["used"], limiter["overflowed"], limiter["stale"]) == (48, 0, 0)


def learn(made: PPOTrainer, first: int, version: int, count: int = 8) -> list[dict[str, float]]:
    """Let records of a version follow those before, and publish many versions of what they teach."""
    metrics = live(made, [record(n, version=version) for n in range(first, first + count)])
    for n in range(1, 51):
        made.published({"policy_value": 1_000 * (first + count) + n})
    return metrics


def test_rollouts_of_a_policy_of_long_ago_are_dropped_and_counted() -> None:
    made = trainer(max_policy_lag=2)
    made.published({"policy_value": 1})
    newest = 1
    for first in (0, 9, 17, 25):
        metrics = learn(made, first, newest, 9 if first == 0 else 8)
        lag = 0.0 if first == 0 else 1 / 8  # each begins with the last record of the one before
        assert metrics[0]["policy_lag"] == lag, "however many versions of one rollout were published"
        newest = 1_000 * (first + (9 if first == 0 else 8)) + 50
    assert made.statistics()["limiter"]["stale"] == 0
    before = weights_of(made)
    assert learn(made, 33, 1) == [], "four rollouts ago"
    assert made.statistics()["limiter"]["stale"] == 8
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(made), strict=True))
    assert len(made._age._published) <= 4, "what is too old to count is not remembered for ever"


def test_to_find_nothing_to_learn_from_harms_nothing() -> None:
    """What waited may have been forgotten just now, as that of a body long gone."""
    made = trainer()
    assert list(made.train()) == []
    assert made._age.learnings == 0


def test_rollouts_without_a_reward_do_not_make_the_policy_older() -> None:
    made = trainer(max_policy_lag=2)
    made.published({"policy_value": 1})
    live(made, [record(n, version=1, rewarded=np.asarray(False)) for n in range(65)])
    assert made.statistics()["limiter"]["unusable"] == 64
    assert learn(made, 65, 1)
    assert made.statistics()["limiter"]["stale"] == 0


def test_how_far_a_policy_lags_is_known_after_a_restore() -> None:
    made = trainer(max_policy_lag=2)
    made.published({"policy_value": 1})
    for n, first in enumerate((0, 9, 17, 25)):
        learn(made, first, 1 if n == 0 else 1_000 * first + 50, 9 if first == 0 else 8)
    again = trainer(max_policy_lag=2)
    again.restore(made.state())
    again.published({"policy_value": 90_000})
    assert learn(again, 33, 1) == []
    assert again.statistics()["limiter"] == {**made.statistics()["limiter"], "stale": 8}
    metrics = learn(again, 41, 90_000)
    assert metrics == [], "it began with the last record of the one before"
    metrics = learn(again, 49, 90_000)
    assert metrics[0]["policy_lag"] == 0.0


def test_an_absurd_reward_costs_its_rollout_and_neither_parameters_nor_moments(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = trainer()
    live(made, [record(n) for n in range(9)])
    moments = len(made._adam.state)
    live(made, [record(n, reward=np.asarray(1e20, np.float32)) for n in range(9, 17)])
    limiter = made.statistics()["limiter"]
    assert (limiter["unusable"], limiter["skipped"], limiter["restored"]) == (8, 0, 0)
    assert len(made._adam.state) == moments > 0
    assert "not finite" not in caplog.text


def test_it_learns_which_choice_is_rewarded() -> None:
    made, random = trainer(rollout_length=32, batch_size=16, epochs=4), np.random.default_rng(0)
    policy, number = made.published_models["policy_value"], 0
    for _ in range(25):
        lived = []
        for _ in range(33):
            with torch.no_grad():
                logits, value = policy(torch.ones(1, 2))
            probabilities = logits.softmax(1)[0].double().numpy()
            choice = int(random.choice(3, p=probabilities / probabilities.sum()))
            previous = lived[-1].data["action"][0] if lived else 0
            lived.append(record(
                number, observation=np.ones(2, np.float32), action=np.array([choice]),
                log_prob=np.asarray(np.log(probabilities[choice]), np.float32),
                value=np.asarray(value.item(), np.float32), reward=np.asarray(float(previous == 1), np.float32),
                rewarded=np.asarray(bool(lived)),
            ))  # fmt: skip
            number += 1
        live(made, lived)
    assert policy(torch.ones(1, 2))[0].softmax(1)[0, 1] > 0.8


@pytest.mark.parametrize("column", ["reward", "value", "log_prob"])
def test_what_is_not_finite_never_reaches_the_parameters(column: str) -> None:
    made = trainer()
    lived = [record(n) for n in range(9)]
    lived[4] = record(4, **{column: np.asarray(np.nan, np.float32)})
    live(made, lived)
    assert all(torch.isfinite(weight).all() for weight in weights_of(made))
    live(made, [record(n) for n in range(9, 30)])
    assert made.statistics()["limiter"]["used"] > 0


def test_the_learning_rate_falls_with_the_records_seen() -> None:
    made = trainer(learning_rate=1e-2, learning_rate_steps=20, epochs=1)
    live(made, [record(n) for n in range(10)])
    assert made._adam.param_groups[0]["lr"] == pytest.approx(5e-3)
    before = weights_of(made)
    live(made, [record(n) for n in range(10, 30)])
    assert made._adam.param_groups[0]["lr"] == 0.0
    assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(made), strict=True)) is False


def test_every_pass_goes_through_all_steps_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(rollout_length=32, batch_size=8, epochs=3, target_kl=None)
    seen: list[list[float]] = []
    step_on = made._optimiser.step_on

    def watch(batch: tuple[Tensor, ...], losses: Any) -> Any:
        seen.append(Minibatch.of_tensors(batch).inputs[0][:, 0].tolist())
        return step_on(batch, losses)

    monkeypatch.setattr(made._optimiser, "step_on", watch)
    live(made, [record(n, observation=np.full(2, n, np.float32)) for n in range(33)])
    passes = [list(chain.from_iterable(seen[begin : begin + 4])) for begin in (0, 4, 8)]
    assert [len(minibatch) for minibatch in seen] == [8] * 12
    assert [sorted(steps) for steps in passes] == [sorted(passes[0])] * 3
    assert len(set(passes[0])) == 32
    assert len(set(map(tuple, passes))) == 3


def test_no_further_pass_after_the_policy_has_moved_far() -> None:
    steady, hasty = trainer(epochs=10, target_kl=None), trainer(epochs=10, target_kl=1e-6)
    lived = [record(n) for n in range(9)]
    assert len(live(steady, lived)) == 20
    assert 2 <= len(live(hasty, lived)) < 20


def test_a_rollout_that_is_left_in_the_middle_frees_its_room() -> None:
    made = trainer()
    for batch in batches([record(n) for n in range(20)]):
        made.consume(batch, True)
    steps = iter(made.train())
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert made.is_trainable()
    assert list(made.train())


def test_bfloat16_trains() -> None:
    made = trainer(precision="bfloat16")
    metrics = live(made, [record(n) for n in range(9)])
    assert metrics
    assert all(np.isfinite(step["loss"]) for step in metrics)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0}, {"batch_size": 1.5}, {"discount": 1.1}, {"learning_rate": -1}, {"normalise_advantages": "never"},
        {"precision": "float8"}, {"device": "abacus"}, {"compile": "maybe"},
        {"batch_size": 1, "normalise_advantages": "minibatch"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_configuration_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        trainer(**settings)
    assert "\n" not in str(caught.value)


def test_explained_variance_is_one_for_a_prophet_and_zero_for_a_constant() -> None:
    returns = np.array([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.full(3, 7.0), returns) == pytest.approx(0.0)
    assert explained_variance(np.zeros(2), np.ones(2)) == 0.0


def test_what_was_published_between_a_checkpoint_and_a_restart_lags_by_one_learning() -> None:
    made = trainer(max_policy_lag=10)
    made.published({"policy_value": 100})
    again = trainer(max_policy_lag=10)
    again.restore(made.state())
    again.published({"policy_value": 401})
    assert [again._age.lag(version) for version in (401, 400, 395, 101)] == [0, 1, 1, 1]
    assert again._age.lag(100) == 0, "as where the run was taken back: no version between has ever been"
    fresh = trainer()
    fresh.published({"policy_value": 7})
    assert [fresh._age.lag(version) for version in (0, 6, 7)] == [0, 1, 0]


def test_lags_are_the_same_before_and_after_a_restore_however_many_versions_a_learning_had() -> None:
    made = trainer(max_policy_lag=5)
    version = 100
    made.published({"policy_value": version})
    for first in range(0, 32, 8):
        live(made, [record(n, version=version) for n in range(first, first + 8 + (first == 0))])
        for _ in range(20):
            version += 1
            made.published({"policy_value": version})
    again = trainer(max_policy_lag=5)
    again.restore(made.state())
    again.published({"policy_value": version + 1})
    assert [again._age.lag(v) for v in range(100, version + 1)] == [made._age.lag(v) for v in range(100, version + 1)]


def test_what_a_process_that_died_had_learned_from_is_not_learned_from_again() -> None:
    """It was saved at version 10, and died after version 30: what came between is sent again by the body."""
    made = trainer()
    live(made, [record(n, version=10) for n in range(9)])
    made.published({"policy_value": 10})
    saved = made.state()
    again = trainer()
    again.restore(saved)
    again.published({"policy_value": 31})  # first of all what it begins with, under a new version
    assert live(again, [record(n, version=10 + n) for n in range(9, 17)]) == []
    limiter = again.statistics()["limiter"]
    assert (limiter["used"], limiter["stale"]) == (8, 8)
    straddling = [record(n, version=min(30, 10 + n)) for n in range(17, 25)]
    assert live(again, straddling), "its end was acted by what the new process began with: nobody has learned from it"
    assert live(again, [record(n, version=31) for n in range(25, 33)])
    limiter = again.statistics()["limiter"]
    assert (limiter["used"], limiter["stale"], limiter["overflowed"]) == (24, 8, 0)


@pytest.mark.parametrize("since", ["learned", "taken back"])
def test_what_lay_in_the_buffer_at_a_save_is_not_learned_from_again_unless_the_run_was_taken_back(since: str) -> None:
    made = trainer()
    made.published({"policy_value": 10})
    for batch in batches([record(n, version=10) for n in range(13)]):
        made.consume(batch, True)
    saved = copied(made.state())
    list(made.train())
    live(made, [record(n, version=10) for n in range(13, 17)])
    assert made.used == 16, "both rollouts, by the process that dies now"
    again = trainer()
    again.restore(saved)
    if since == "learned":
        again._policy.load_state_dict(made._policy.state_dict())
    again.published({"policy_value": 31})
    live(again, [record(n, version=10) for n in range(13, 17)])
    assert (again.used, again.stale) == ((0, 16) if since == "learned" else (16, 0))


@pytest.mark.parametrize("phases", ["the same", "spread"])
def test_of_many_bodies_every_record_is_used(phases: str) -> None:
    bodies, length = 12, 8
    made, version = trainer(rollout_length=length, max_policy_lag=3), 1
    made.published({"policy_value": version})
    begin = [0 if phases == "the same" else body % length for body in range(bodies)]
    for tick in range(6 * length):
        for body in range(bodies):
            if tick >= begin[body]:
                (batch,) = batches([record(tick - begin[body], version=version)], body=f"body{body}")
                made.consume(batch, True)
        while made.is_trainable():
            assert list(made.train())
            version += 1
            made.published({"policy_value": version})
    limiter = made.statistics()["limiter"]
    assert (limiter["stale"], limiter["overflowed"], limiter["unusable"]) == (0, 0, 0)
    assert limiter["used"] >= bodies * length * 4
    assert made._age.learnings <= 12, "a round is learned from in two halves at most"
