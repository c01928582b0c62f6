"""Rewards against their papers' formulas, written down a second time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from ami_inference.rewards import (
    ExtrinsicReward,
    LearningProgress,
    NormalisedPredictionError,
    PredictionError,
    RewardMixture,
)
from ami_inference.rewards.curiosity import SETTLED_AFTER
from ami_inference.rewards.reward import RewardModule, Transition
from ami_shared.config import build, load_config
from ami_shared.errors import ConfigurationError

WILD = np.random.default_rng(7).lognormal(-2.0, 2.0, 1_000)  # as heavy-tailed as the errors measured on the reference


def rewards(module: RewardModule, surprises: Sequence[float]) -> list[float]:
    return [module.reward(Transition(float(surprise))) for surprise in surprises]


def running_deviations(surprises: Sequence[float], discount: float) -> np.ndarray[Any, Any]:
    """Burda et al. 2018: the standard deviation of all discounted sums so far, over and over from the beginning."""
    sums = [0.0]
    for surprise in surprises:
        sums.append(discount * sums[-1] + surprise)
    return np.array([np.std(sums[1 : n + 1]) for n in range(1, len(surprises) + 1)])


def test_the_raw_prediction_error_is_scaled_and_shifted() -> None:
    assert rewards(PredictionError(), [0.0, 0.13, 369.0]) == [0.0, 0.13, 369.0]
    assert rewards(PredictionError(scale=2.0, shift=-0.5), [0.0, 1.0]) == [-0.5, 1.5]


@pytest.mark.parametrize("discount", [0.0, 0.9, 0.99])
def test_the_error_is_divided_by_the_running_deviation_of_its_discounted_sum(discount: float) -> None:
    got = rewards(NormalisedPredictionError(discount, clip=1e9, memory_steps=None), WILD)
    expected = WILD / np.where(deviations := running_deviations(WILD, discount), deviations, WILD[0])
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_while_the_memory_is_not_full_everything_counts_the_same() -> None:
    forgetting, keeping = (NormalisedPredictionError(memory_steps=steps) for steps in (500.0, None))
    assert rewards(forgetting, WILD[:500]) == rewards(keeping, WILD[:500])
    assert rewards(forgetting, WILD[500:]) != rewards(keeping, WILD[500:])


def test_the_deviation_forgets_the_errors_of_the_first_minutes() -> None:
    rough, smooth = np.random.default_rng(0).exponential(100.0, 500), np.random.default_rng(1).exponential(1.0, 6_000)
    forgetting, keeping, young = (NormalisedPredictionError(clip=1e9, memory_steps=s) for s in (200.0, None, 200.0))
    for module in (forgetting, keeping):
        rewards(module, [*rough, *smooth])
    rewards(young, smooth)
    assert forgetting.deviation == pytest.approx(young.deviation, rel=0.01)
    assert keeping.deviation > 10 * young.deviation


def test_rewards_do_not_depend_on_the_scale_of_the_errors() -> None:
    small, large = (rewards(NormalisedPredictionError(), WILD * scale) for scale in (1e-3, 1e3))
    np.testing.assert_allclose(small, large, rtol=1e-6)


def test_a_normalised_reward_is_clipped() -> None:
    module = NormalisedPredictionError(clip=2.0)
    assert max(rewards(module, WILD)) == 2.0
    assert module.reward(Transition(1e30)) == 2.0


def test_the_first_rewards_are_finite_and_of_size_one() -> None:
    assert rewards(NormalisedPredictionError(), [0.3])[0] == pytest.approx(1.0)
    assert rewards(NormalisedPredictionError(), [0.0, 0.0, 0.0]) == [0.0] * 3
    assert all(0 <= reward <= 5.0 for reward in rewards(NormalisedPredictionError(), [0.0, 0.3, 0.3, 40.0]))


@pytest.mark.parametrize("make", [NormalisedPredictionError, LearningProgress])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_enters_the_statistics(make: type[RewardModule], bad: float) -> None:
    clean, dirty = make(), make()
    expected = rewards(clean, WILD[:100])
    got = []
    for n, surprise in enumerate(WILD[:100]):
        if n % 10 == 0:
            assert not math.isfinite(dirty.reward(Transition(bad))), "whoever takes it can tell"
        got.append(dirty.reward(Transition(float(surprise))))
    assert got == expected
    assert dirty.state() == clean.state()


def test_a_constant_error_is_no_progress() -> None:
    assert rewards(LearningProgress(), [3.0] * 300) == [0.0] * 300


def test_noise_is_worth_nothing_in_the_long_run() -> None:
    noise = np.random.default_rng(0).normal(3.0, 1.0, 20_000)
    assert np.mean(rewards(LearningProgress(), noise)[2_000:]) == pytest.approx(0.0, abs=0.01)


def test_a_falling_error_is_rewarded_and_a_rising_one_punished() -> None:
    falling = np.linspace(10.0, 1.0, 500)
    assert min(rewards(LearningProgress(), falling)[1:]) > 0
    assert max(rewards(LearningProgress(), falling[::-1])[1:]) < 0


def test_progress_at_a_steady_rate_is_the_rate_times_the_distance_of_the_means() -> None:
    steady = 1_000.0 - 0.1 * np.arange(3_000)
    assert rewards(LearningProgress(20, 200, scale=2.0), steady)[-1] == pytest.approx(2.0 * 0.1 * (200 - 20), rel=1e-3)


def test_the_environment_s_reward_is_scaled() -> None:
    assert ExtrinsicReward(scale=0.5).reward(Transition(None, -3.0)) == -1.5


@pytest.mark.parametrize("make", [PredictionError, NormalisedPredictionError, LearningProgress])
def test_curiosity_without_a_prediction_is_a_configuration_error(make: type[RewardModule]) -> None:
    with pytest.raises(ConfigurationError, match=r"^inference\.agent\.reward: .*forward_dynamics"):
        make().reward(Transition(None, 1.0))


def test_a_world_without_rewards_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"^inference\.agent\.reward: "):
        ExtrinsicReward().reward(Transition(1.0, None))


def test_a_mixture_is_the_weighted_sum_of_its_parts() -> None:
    mixture = RewardMixture([PredictionError(), ExtrinsicReward(scale=10.0)], [0.5, 2])
    assert mixture.reward(Transition(3.0, 1.0)) == 0.5 * 3.0 + 2 * 10.0


class Stateless:
    """A reward that has nothing to remember."""

    def begin_segment(self) -> None: ...

    def reward(self, transition: Transition) -> float:
        return 1.0


def test_a_part_of_a_mixture_need_not_remember_anything() -> None:
    mixture = RewardMixture([Stateless(), NormalisedPredictionError()], [1.0, 1.0])
    mixture.restore(mixture.state())
    assert math.isfinite(mixture.reward(Transition(3.0, 1.0)))


def test_a_mixture_of_other_parts_begins_anew_where_they_differ(caplog: pytest.LogCaptureFixture) -> None:
    lived = RewardMixture([NormalisedPredictionError(), LearningProgress()], [1.0, 1.0])
    rewards(lived, WILD[:50])
    other = RewardMixture([NormalisedPredictionError(), NormalisedPredictionError(0.5)], [1.0, 1.0])
    fresh = NormalisedPredictionError(0.5).state()
    other.restore(lived.state())
    first, second = other.state()["parts"]
    assert first == lived.state()["parts"][0]
    assert {**fresh, "class": "NormalisedPredictionError"} == second
    assert "starts afresh" in caplog.text
    longer = RewardMixture([PredictionError(), *lived._parts], [1.0, 1.0, 1.0])
    before = longer.state()
    longer.restore(lived.state())
    assert longer.state() == before


@pytest.mark.parametrize(("parts", "weights"), [(2, [1.0]), (1, [1.0, 2.0]), (0, [])])
def test_a_mixture_needs_one_weight_for_each_part(parts: int, weights: list[float]) -> None:
    with pytest.raises(ConfigurationError, match=r"^inference\.agent\.reward: .*weights"):
        RewardMixture([PredictionError() for _ in range(parts)], weights)


@pytest.mark.parametrize("weight", [math.nan, "heavy", None])
def test_a_mixture_s_weights_are_finite_numbers(weight: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^inference\.agent\.reward: weights\[1\]="):
        RewardMixture([PredictionError(), ExtrinsicReward()], [1.0, weight])


def test_the_configured_mixture_is_curiosity_and_the_world_s_reward() -> None:
    config = load_config(["experiment=simulated", "inference/reward@inference.agent.reward=mixture"])
    reward = build(config.inference.agent.reward, "inference.agent.reward")
    assert reward.reward(Transition(2.0, 3.0)) == pytest.approx(1.0 + 3.0)


def test_a_mixture_tells_its_parts_of_a_new_segment() -> None:
    begun: list[str] = []

    class Told(PredictionError):
        def begin_segment(self) -> None:
            begun.append("segment")

    RewardMixture([Told(), Told()], [1, 1]).begin_segment()
    assert begun == ["segment"] * 2


@pytest.mark.parametrize(
    "make",
    [
        PredictionError,
        ExtrinsicReward,
        NormalisedPredictionError,
        lambda: NormalisedPredictionError(memory_steps=50.0),
        LearningProgress,
        lambda: RewardMixture([NormalisedPredictionError(), LearningProgress(), ExtrinsicReward()], [1, 2, 3]),
    ],
    ids=["raw", "extrinsic", "normalised", "forgetting", "progress", "mixture"],
)
@pytest.mark.parametrize("steps", [0, 1, 200])
def test_a_restored_reward_goes_on_to_the_last_bit(make: Any, steps: int) -> None:
    lived: RewardModule = make()
    transitions = [Transition(float(surprise), 0.1) for surprise in WILD]
    for transition in transitions[:steps]:
        lived.reward(transition)
    kept = json.loads(json.dumps(lived.state()))  # plain numbers, lists and maps only
    restored: RewardModule = make()
    restored.restore(kept)
    later = transitions[steps : steps + 100]
    assert [restored.reward(t) for t in later] == [lived.reward(t) for t in later]
    assert restored.state() == lived.state()


@pytest.mark.parametrize(
    ("section", "transition", "expected"),
    [
        ({"_target_": "ami_inference.rewards.PredictionError", "scale": 3}, Transition(2.0), 6.0),
        ({"_target_": "ami_inference.rewards.NormalisedPredictionError"}, Transition(2.0), 1.0),
        ({"_target_": "ami_inference.rewards.LearningProgress", "fast_steps": 5}, Transition(2.0), 0.0),
        ({"_target_": "ami_inference.rewards.ExtrinsicReward", "scale": 3}, Transition(None, 2.0), 6.0),
        (
            {
                "_target_": "ami_inference.rewards.RewardMixture",
                "parts": [
                    {"_target_": "ami_inference.rewards.PredictionError"},
                    {"_target_": "ami_inference.rewards.ExtrinsicReward"},
                ],
                "weights": [1, 100],
            },
            Transition(2.0, 3.0),
            302.0,
        ),
    ],
    ids=lambda value: value["_target_"].rpartition(".")[2] if isinstance(value, Mapping) else "",
)
def test_every_reward_is_built_from_its_section(
    section: dict[str, Any], transition: Transition, expected: float
) -> None:
    assert build(section, "inference.agent.reward").reward(transition) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("NormalisedPredictionError", "discount", 1.0),
        ("NormalisedPredictionError", "discount", math.nan),
        ("NormalisedPredictionError", "clip", 0.0),
        ("NormalisedPredictionError", "clip", math.nan),
        ("NormalisedPredictionError", "memory_steps", 1.0),
        ("LearningProgress", "fast_steps", 0.5),
        ("LearningProgress", "fast_steps", 200.0),
        ("LearningProgress", "slow_steps", math.nan),
        ("LearningProgress", "scale", math.inf),
        ("PredictionError", "scale", "abc"),
        ("PredictionError", "shift", math.nan),
        ("PredictionError", "scale", True),
        ("ExtrinsicReward", "scale", None),
    ],
)
def test_an_argument_out_of_range_is_one_line_that_names_it(name: str, argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=argument) as caught:
        build({"_target_": f"ami_inference.rewards.{name}", argument: value}, "inference.agent.reward")
    assert str(caught.value).startswith("inference.agent.reward")
    assert "\n" not in str(caught.value)


def test_one_absurd_error_does_not_silence_curiosity() -> None:
    module, unmoved = NormalisedPredictionError(), NormalisedPredictionError()
    for reward in (module, unmoved):
        rewards(reward, np.random.default_rng(0).exponential(1.0, 2 * SETTLED_AFTER))
    assert module.reward(Transition(1e12)) == 5.0
    later = np.random.default_rng(1).exponential(1.0, 20_000)
    mean = np.mean(rewards(module, later)[-1_000:])
    assert mean == pytest.approx(np.mean(rewards(unmoved, later)[-1_000:]), rel=0.2)


def test_a_scale_that_has_truly_changed_is_followed_all_the_same() -> None:
    module = NormalisedPredictionError()
    rewards(module, np.random.default_rng(0).exponential(1.0, 2 * SETTLED_AFTER))
    assert np.mean(rewards(module, np.random.default_rng(1).exponential(1e6, 1_000))[-500:]) < 1.0
