"""The curious agent with models small enough to be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ami_inference.agents import CuriosityAgent
from ami_inference.agents.agent import Decision, explained
from ami_inference.rewards import ExtrinsicReward, PredictionError, RewardMixture
from ami_inference.rewards.reward import RewardModule, Transition
from ami_inference.sensors.sensor import Observation
from ami_shared.errors import ConfigurationError, SensorLostError, WireError
from ami_shared.models.policy_value import (
    ImageTrunk,
    MemoryTrunk,
    MultiCategorical,
    PolicyValueCommonNet,
    VectorTrunk,
    orthogonal,
)
from ami_shared.models.replicas import Replicas
from ami_shared.records import Ending, Record, RecordBatch
from ami_shared.wire import decode, encode

CHOICES = (3, 2)
SIZE = 36
DEPTH, WIDTH = 2, 4


class Encoder(nn.Module):
    """Three numbers: the mean of each colour."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, observation: Tensor) -> Tensor:
        return observation.float().mean((2, 3)) * self.scale


class Dynamics(nn.Module):
    """Predicts embedding + first choice + number of steps remembered."""

    def __init__(self, choices: Sequence[int] = CHOICES) -> None:
        super().__init__()
        self.choices = tuple(choices)
        self.scale, self.memory = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def initial_hidden(self, batch: int) -> Tensor:
        return torch.zeros(batch, DEPTH, WIDTH, dtype=torch.complex64, device=self.scale.device)

    def step(self, embedding: Tensor, hidden: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        remembered = hidden.real.mean((1, 2)).unsqueeze(1)
        return embedding * self.scale + action[:, :1] + remembered, hidden + self.memory


def make_policy(trunk: str = "image", choices: Sequence[int] = CHOICES) -> PolicyValueCommonNet:
    torch.manual_seed(3)
    trunks = {
        "image": lambda: ImageTrunk(SIZE, SIZE, [4, 4, 4], 16),
        "vector": lambda: VectorTrunk(4, 16),
        "memory": lambda: MemoryTrunk(3, (DEPTH, WIDTH), 16),
    }
    policy = PolicyValueCommonNet(trunks[trunk](), choices)
    orthogonal(policy.policy_head, 1.0)  # as sure of itself as after some learning
    return policy


def frame(level: int) -> Observation:
    return Observation(np.full((3, SIZE, SIZE), level, np.uint8))


def vector(*values: float, **about: Any) -> Observation:
    return Observation(np.array(values, np.float32), **about)


class Life:
    """An agent and its models, which a test may spoil."""

    def __init__(self, trunk: str = "image", reward: RewardModule | None = None, seed: int = 0) -> None:
        self.replicas = Replicas(
            {"image_encoder": Encoder(), "forward_dynamics": Dynamics(), "policy_value": make_policy(trunk)}
        )
        self.agent = CuriosityAgent(self.replicas, CHOICES, reward or PredictionError(), seed)
        self.agent.begin_segment()

    def step(self, level: int = 10, **about: Any) -> Decision:
        return self.agent.step(Observation(frame(level).values, **about))

    def spoil(self, model: str, parameter: str, value: float) -> None:
        self.replicas[model].get_parameter(parameter).fill_(value)


@pytest.fixture
def life() -> Life:
    return Life()


def plain(seed: int = 0, reward: RewardModule | None = None) -> CuriosityAgent:
    agent = CuriosityAgent(
        Replicas({"policy_value": make_policy("vector")}), CHOICES, reward or ExtrinsicReward(), seed
    )
    agent.begin_segment()
    return agent


def reward_of(decision: Decision) -> float | None:
    reward, rewarded = decision.record["reward"], decision.record["rewarded"]
    assert math.isfinite(reward)
    return float(reward) if rewarded else None


def test_the_reward_is_pi_times_the_mean_squared_error_of_the_prediction(life: Life) -> None:
    first = life.step(10)
    second = life.step(14)
    predicted = 10 + first.action[0] + 0
    assert reward_of(second) == pytest.approx(math.pi * (14 - predicted) ** 2)
    third = life.step(20)
    predicted = 14 + second.action[0] + 1  # one step is remembered
    assert reward_of(third) == pytest.approx(math.pi * (20 - predicted) ** 2)


def test_the_reward_is_the_negative_log_density_of_a_normal_with_sigma_one_over_root_two_pi(life: Life) -> None:
    first = life.step(10)
    density = torch.distributions.Normal(10.0 + float(first.action[0]), 1 / math.sqrt(2 * math.pi))
    assert reward_of(life.step(12)) == pytest.approx(-density.log_prob(torch.tensor(12.0)).item(), rel=1e-5)


def test_the_reward_module_judges_every_transition() -> None:
    seen: list[Transition] = []

    class Judge(PredictionError):
        def reward(self, transition: Transition) -> float:
            seen.append(transition)
            return -1.5

    life = Life(reward=Judge())
    life.step(10, reward=0.25)
    assert reward_of(life.step(10, reward=0.5)) == -1.5
    assert len(seen) == 1
    assert seen[0].extrinsic == 0.5
    assert seen[0].surprise is not None


def test_the_first_step_of_a_segment_has_no_reward_and_none_is_made_up(life: Life) -> None:
    assert reward_of(life.step(10)) is None
    assert reward_of(life.step(10)) is not None
    life.agent.begin_segment()
    assert reward_of(life.step(200)) is None
    assert reward_of(life.step(10)) is not None


def test_an_interruption_leaves_what_is_remembered_and_the_end_of_an_episode_does_not(life: Life) -> None:
    hidden = [life.step().record["hidden"] for _ in range(3)]
    life.agent.begin_segment()
    hidden.append(life.step().record["hidden"])
    last = life.step(ending=Ending.TERMINATED)
    hidden.append(last.record["hidden"])
    life.agent.begin_segment()
    hidden.append(life.step().record["hidden"])
    assert [float(h.real.mean()) for h in hidden] == [0.0, 1.0, 2.0, 3.0, 4.0, 0.0]


def test_the_last_step_of_an_episode_has_its_reward(life: Life) -> None:
    before = life.step(10)
    last = life.step(12, ending=Ending.TRUNCATED)
    assert reward_of(last) == pytest.approx(math.pi * (2 - before.action[0]) ** 2)


def test_the_hidden_state_of_a_record_is_the_one_before_its_step_and_stays_as_it_was(life: Life) -> None:
    first = life.step(10)
    assert (first.record["hidden"] == 0).all()
    embedding = torch.from_numpy(first.record["embedding"]).unsqueeze(0)
    hidden, action = (torch.from_numpy(first.record[name]).unsqueeze(0) for name in ("hidden", "action"))
    kept = first.record["hidden"].copy()
    with torch.inference_mode():
        mean, after = life.replicas["forward_dynamics"].step(embedding, hidden, action)  # type: ignore[operator]
    second = life.step(30)
    np.testing.assert_array_equal(second.record["hidden"], after[0].numpy())
    assert reward_of(second) == pytest.approx(math.pi * float((30 - mean).square().mean()))
    np.testing.assert_array_equal(first.record["hidden"], kept)


def test_a_record_has_the_same_columns_at_every_step(life: Life) -> None:
    expected = {
        "observation": (np.uint8, (3, SIZE, SIZE)),
        "embedding": (np.float32, (3,)),
        "hidden": (np.complex64, (DEPTH, WIDTH)),
        "action": (np.int64, (2,)),
        "log_probs": (np.float32, (2,)),
        "log_prob": (np.float32, ()),
        "value": (np.float32, ()),
        "reward": (np.float32, ()),
        "rewarded": (np.bool_, ()),
    }
    records = [life.step(n).record for n in (1, 2)]
    records.append(life.step(3, ending=Ending.TERMINATED).record)
    life.agent.begin_segment()
    records.append(life.step(4).record)
    life.spoil("policy_value", "value_head.bias", math.nan)
    records.append(life.step(5).record)
    for record in records:
        assert {name: (column.dtype, column.shape) for name, column in record.items()} == expected
    batch = RecordBatch.stack("body", "1", [Record(0, n, 0.0, 0.0, {"m": 1}, data) for n, data in enumerate(records)])
    back = RecordBatch.from_message(decode(encode(batch.to_message())))
    for name, column in batch.data.items():
        np.testing.assert_array_equal(back.data[name], column)


def test_the_action_in_the_record_is_the_one_decided_on(life: Life) -> None:
    decisions = [life.step(n) for n in range(20)]
    assert all((d.record["action"] == d.action).all() for d in decisions)
    assert all((d.action >= 0).all() and (d.action < CHOICES).all() for d in decisions)


@pytest.mark.parametrize("trunk", ["image", "memory"])
def test_probabilities_and_value_are_those_of_the_policy(trunk: str) -> None:
    life = Life(trunk)
    policy = life.replicas["policy_value"]
    for level in range(0, 250, 25):
        record = life.step(level).record
        inputs = [torch.from_numpy(record[name]).unsqueeze(0) for name in policy.inputs]  # type: ignore[union-attr]
        with torch.inference_mode():
            logits, value = policy(*inputs)
        action = torch.from_numpy(record["action"]).unsqueeze(0)
        distribution = MultiCategorical(logits, CHOICES)
        np.testing.assert_allclose(record["log_probs"], distribution.log_probs(action)[0].numpy(), atol=1e-6)
        assert float(record["log_prob"]) == pytest.approx(float(distribution.log_prob(action)), abs=1e-6)
        assert float(record["log_prob"]) == pytest.approx(float(record["log_probs"].sum()), abs=1e-6)
        assert float(record["value"]) == pytest.approx(float(value), abs=1e-6)


def test_actions_are_distributed_as_the_policy_says() -> None:
    agent, seen = plain(seed=5), vector(0.5, -1.0, 2.0, 0.1, reward=0.0)
    count = 6_000
    taken = np.array([agent.step(seen).action for _ in range(count)])
    with torch.inference_mode():
        logits, _ = make_policy("vector")(torch.from_numpy(seen.values).unsqueeze(0))
    probabilities = [part.softmax(1)[0].double().numpy() for part in logits.split(list(CHOICES), dim=1)]
    joint = np.outer(*probabilities) * count
    counted = np.histogram2d(taken[:, 0], taken[:, 1], bins=[np.arange(n + 1) for n in CHOICES])[0]
    assert joint.min() > 5, "no cell is too rare for the test"
    assert joint.max() > 2 * joint.min(), "nor is the policy uniform"
    chi_squared = ((counted - joint) ** 2 / joint).sum()
    assert chi_squared < 15.09  # 99 % of the distribution with 5 degrees of freedom


def test_the_same_seed_acts_the_same() -> None:
    observations = [vector(*np.random.default_rng(n).normal(size=4), reward=0.0) for n in range(50)]
    runs = []
    for seed in (1, 1, 2):
        agent = plain(seed)
        runs.append([agent.step(observation).action.tolist() for observation in observations])
    assert runs[0] == runs[1] != runs[2]


def test_a_policy_alone_is_a_plain_ppo_agent() -> None:
    agent = plain()
    first, second = agent.step(vector(0, 0, 0, 0)), agent.step(vector(0, 0, 0, 1, reward=2.0))
    assert reward_of(first) is None
    assert reward_of(second) == 2.0
    assert not {"embedding", "hidden"} & set(second.record)
    np.testing.assert_array_equal(second.record["observation"], [0, 0, 0, 1])
    assert second.record["observation"].dtype == np.float32


def test_it_acts_with_the_replicas_in_use(life: Life) -> None:
    before = life.step(10)
    life.spoil("image_encoder", "scale", 2.0)
    after = life.step(10)
    assert after.record["embedding"].tolist() == [20.0] * 3
    assert before.record["embedding"].tolist() == [10.0] * 3


@pytest.mark.parametrize(
    ("models", "told"),
    [
        (["image_encoder"], "policy_value is missing"),
        (["forward_dynamics", "policy_value"], "image_encoder"),
        ([], "policy_value is missing"),
    ],
)
def test_a_model_that_is_missing_is_a_configuration_error(models: list[str], told: str) -> None:
    made = {"image_encoder": Encoder(), "forward_dynamics": Dynamics(), "policy_value": make_policy()}
    with pytest.raises(ConfigurationError, match=rf"^inference\.agent\.models: .*{told}"):
        CuriosityAgent(Replicas({name: made[name] for name in models}), CHOICES, PredictionError())


@pytest.mark.parametrize("models", [["policy_value"], ["image_encoder", "policy_value"]])
def test_a_policy_that_looks_at_what_no_model_makes_is_a_configuration_error(models: list[str]) -> None:
    made = {"image_encoder": Encoder(), "policy_value": make_policy("memory")}
    with pytest.raises(ConfigurationError, match=r"^policy_input: .*hidden"):
        CuriosityAgent(Replicas({name: made[name] for name in models}), CHOICES, ExtrinsicReward())


@pytest.mark.parametrize("named", ["policy_value", "forward_dynamics"])
def test_choices_that_do_not_fit_the_environment_are_a_configuration_error(named: str) -> None:
    models: dict[str, nn.Module] = {
        "image_encoder": Encoder(),
        "forward_dynamics": Dynamics((3, 3) if named == "forward_dynamics" else CHOICES),
        "policy_value": make_policy("image", (3, 3) if named == "policy_value" else CHOICES),
    }
    with pytest.raises(ConfigurationError, match=rf"^models\.{named}: choices \(3, 3\).*\(3, 2\).*action\.choices"):
        CuriosityAgent(Replicas(models), CHOICES, PredictionError())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_observation_that_is_not_finite_counts_as_a_lost_sensor(bad: float) -> None:
    agent = plain()
    agent.step(vector(0, 0, 0, 0))
    with pytest.raises(SensorLostError, match="finite"):
        agent.step(vector(0, bad, 0, 0))
    agent.begin_segment()
    assert reward_of(agent.step(vector(0, 0, 0, 0))) is None
    assert reward_of(agent.step(vector(0, 0, 0, 0, reward=1.0))) == 1.0


def test_metrics_are_means_since_the_last_call(life: Life) -> None:
    assert life.agent.metrics() == {}
    decisions = [life.step(level) for level in (10, 14, 20)]
    told = life.agent.metrics()
    rewards = [float(d.record["reward"]) for d in decisions[1:]]
    assert told["reward"] == told["surprise"] == pytest.approx(np.mean(rewards))
    assert told["value"] == pytest.approx(np.mean([float(d.record["value"]) for d in decisions]))
    assert 0 < told["entropy"] <= math.log(6) + 1e-6
    latest = life.step(14)
    assert life.agent.metrics()["reward"] == pytest.approx(float(latest.record["reward"]))
    assert life.agent.metrics() == {}


def test_the_entropy_told_is_that_of_the_policy() -> None:
    agent, seen = plain(), vector(0.5, -1.0, 2.0, 0.1)
    agent.step(seen)
    with torch.inference_mode():
        logits, _ = make_policy("vector")(torch.from_numpy(seen.values).unsqueeze(0))
    assert agent.metrics()["entropy"] == pytest.approx(float(MultiCategorical(logits, CHOICES).entropy()), rel=1e-5)


def finite(record: Mapping[str, Any]) -> bool:
    return all(np.isfinite(column).all() for column in record.values())


def heals(life: Life, not_finite: int) -> None:
    """Two steps after the models are good again, all is as if nothing had been."""
    life.step(10)
    assert reward_of(life.step(10)) is not None
    assert life.agent.statistics()["not_finite"] == not_finite
    life.step(10)
    assert life.agent.statistics()["not_finite"] == not_finite


def test_a_surprise_beyond_all_numbers_is_no_reward(life: Life) -> None:
    life.spoil("forward_dynamics", "scale", 1e30)  # finite, unlike its square
    life.step(10)
    life.spoil("forward_dynamics", "scale", 1.0)
    second = life.step(10)
    assert reward_of(second) is None
    assert finite(second.record)
    assert "surprise" not in life.agent.metrics()
    assert second.record["hidden"].real.mean() == 1.0, "what is remembered was not to blame"
    heals(life, not_finite=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_a_reward_that_is_not_finite_is_none(bad: float) -> None:
    life = Life(reward=RewardMixture([PredictionError(), ExtrinsicReward()], [1, 1]))
    life.step(10)
    second = life.step(10, reward=bad)
    assert reward_of(second) is None
    assert finite(second.record)
    assert life.agent.statistics()["not_finite"] == 1
    assert reward_of(life.step(10, reward=1.0)) is not None


@pytest.mark.parametrize("parameter", ["scale", "memory"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_snapshot_of_the_dynamics_is_forgotten_with_the_next_good_one(
    life: Life, parameter: str, bad: float
) -> None:
    life.step(10)
    life.spoil("forward_dynamics", parameter, bad)
    records = [life.step(10).record for _ in range(4)]
    assert all(finite(record) for record in records)
    assert [bool(record["rewarded"]) for record in records] == [True, False, False, False]
    assert (records[-1]["hidden"] == 0).all()
    life.spoil("forward_dynamics", parameter, 1.0)
    heals(life, not_finite=4)


def test_a_bad_prediction_across_an_interruption_leaves_nothing(life: Life) -> None:
    life.spoil("forward_dynamics", "memory", math.nan)
    life.step(10)
    life.agent.begin_segment()
    record = life.step(10).record
    assert finite(record)
    assert (record["hidden"] == 0).all()


def test_without_a_prediction_a_curiosity_reward_is_not_asked(life: Life) -> None:
    life.spoil("forward_dynamics", "scale", math.nan)
    life.step(10)
    assert reward_of(life.step(10, reward=1.0)) is None, "rather than the error of a missing forward dynamics"


@pytest.mark.parametrize("trunk", ["image", "memory"])
def test_a_bad_snapshot_of_the_encoder_leaves_records_finite_and_unrewarded(trunk: str) -> None:
    life = Life(trunk)
    life.step(10)
    life.spoil("image_encoder", "scale", math.nan)
    records = [life.step(10).record for _ in range(3)]
    assert all(finite(record) for record in records)
    assert not any(record["rewarded"] for record in records)
    life.spoil("image_encoder", "scale", 1.0)
    assert reward_of(life.step(10)) is None, "what it was compared with was never seen"
    assert reward_of(life.step(10)) is not None
    assert life.agent.statistics()["not_finite"] == 3


@pytest.mark.parametrize("parameter", ["policy_head.weight", "value_head.bias"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_snapshot_of_the_policy_stands_still_and_is_counted(life: Life, parameter: str, bad: float) -> None:
    life.step(10)
    good = life.replicas["policy_value"].get_parameter(parameter).clone()
    life.replicas["policy_value"].get_parameter(parameter).fill_(bad)
    decisions = [life.step(10) for _ in range(4)]
    assert all((d.action == 0).all() for d in decisions)
    assert all(finite(d.record) for d in decisions)
    assert not any(d.record["rewarded"] for d in decisions), "an unknown value gives the step before no advantage"
    assert all(d.record["log_prob"] == 0 for d in decisions), "standing still was certain"
    assert math.isfinite(sum(life.agent.metrics().values()))
    life.replicas["policy_value"].get_parameter(parameter).copy_(good)
    assert reward_of(life.step(10)) is None, "nobody chose the action before"
    assert reward_of(life.step(10)) is not None
    assert life.agent.statistics()["not_finite"] == 4


def test_a_plain_agent_stands_still_as_well() -> None:
    policy = make_policy("vector")
    agent = CuriosityAgent(Replicas({"policy_value": policy}), CHOICES, ExtrinsicReward())
    policy.policy_head.weight.fill_(math.nan)
    agent.begin_segment()
    for _ in range(3):
        assert (agent.step(vector(0, 0, 0, 1, reward=1.0)).action == 0).all()
    assert agent.statistics() == {"not_finite": 3}


def test_trouble_is_said_once(life: Life, caplog: pytest.LogCaptureFixture) -> None:
    life.spoil("policy_value", "policy_head.weight", math.nan)
    for _ in range(5):
        life.step(10)
    assert len(caplog.records) == 1
    assert "not finite" in caplog.text


class Narrow(Dynamics):
    """Predicts one number, whatever the embedding has."""

    def step(self, embedding: Tensor, hidden: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        prediction, hidden = super().step(embedding, hidden, action)
        return prediction[:, :1], hidden


def test_a_prediction_that_would_have_to_be_broadcast_is_a_configuration_error() -> None:
    models = {"image_encoder": Encoder(), "forward_dynamics": Narrow(), "policy_value": make_policy()}
    agent = CuriosityAgent(Replicas(models), CHOICES, PredictionError())
    agent.begin_segment()
    with pytest.raises(ConfigurationError, match=r"predicts \(1, 1\) of an embedding \(1, 3\)"):
        agent.step(frame(10))


def test_observations_that_the_models_do_not_take_are_a_configuration_error() -> None:
    torch.manual_seed(0)
    replicas = Replicas({"policy_value": PolicyValueCommonNet(VectorTrunk(4), (2,))})
    agent = CuriosityAgent(replicas, (2,), ExtrinsicReward())
    with pytest.raises(ConfigurationError, match=r"do not take observations float32\[3\]") as caught:
        agent.step(Observation(np.zeros(3, np.float32)))
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_full_is_not_taken_for_models_of_another_size() -> None:
    with pytest.raises(torch.OutOfMemoryError), explained(frame(10), fits=False):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_an_agent_lives_on_a_gpu_as_on_the_cpu_and_moves_between_them() -> None:
    here, there = Life(), Life()
    for replica in ("image_encoder", "forward_dynamics", "policy_value"):
        there.replicas[replica].load_state_dict(here.replicas[replica].state_dict())
        there.replicas[replica].cuda()
    there.replicas.device = torch.device("cuda")
    there.agent.begin_segment()
    there.agent.restore(here.agent.state())
    for level in (10, 200, 30, 90):
        mine, theirs = here.step(level).record, there.step(level).record
        assert {name: (value.dtype, value.shape) for name, value in mine.items()} == {
            name: (value.dtype, value.shape) for name, value in theirs.items()
        }
        for name in mine:
            np.testing.assert_allclose(theirs[name], mine[name], rtol=1e-2, atol=1e-3, err_msg=name)
    here.agent.restore(there.agent.state())
    np.testing.assert_allclose(here.step(5).record["hidden"], there.step(5).record["hidden"], rtol=1e-2, atol=1e-3)


def test_what_begins_an_episode_is_met_without_a_memory_whatever_was_restored(life: Life) -> None:
    for _ in range(3):
        life.step(10)
    again = Life()
    again.agent.restore(life.agent.state())
    assert again.step(10).record["hidden"].real.mean() == 3.0
    anew = Life()
    anew.agent.restore(life.agent.state())
    anew.agent.begin_segment()
    assert (anew.step(10, beginning=True).record["hidden"] == 0).all()
    assert anew.step(10).record["hidden"].real.mean() == 1.0


def test_a_hidden_state_that_does_not_fit_costs_nothing_else(life: Life) -> None:
    for _ in range(3):
        life.step(10)
    kept = dict(life.agent.state())
    kept["tensors"] = {"hidden": np.zeros((1, DEPTH + 1, WIDTH), np.complex64)}
    kept["not_finite"] = 5
    again = Life(seed=9)
    with pytest.raises(WireError, match="hidden state does not fit"):
        again.agent.restore(kept)
    state = again.agent.state()
    assert state["random"] == life.agent.state()["random"]
    assert state["not_finite"] == 5
    assert (state["tensors"]["hidden"] == 0).all()
