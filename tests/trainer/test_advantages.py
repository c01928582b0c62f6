from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_shared.records import Ending
from ami_trainer.advantages import Advantages, generalised_advantages

GAMMA, LAMBDA = 0.9, 0.8


def worth(rewards: list[float], values: list[float], **flags: list[Any]) -> Advantages:
    count = len(rewards)
    given_flags: dict[str, list[Any]] = {
        "rewarded": [False] + [True] * (count - 1), "endings": [0] * count, "follows": [False] + [True] * (count - 1),
        **flags,
    }  # fmt: skip
    return generalised_advantages(
        np.array(rewards, np.float32),
        np.array(given_flags["rewarded"]),
        np.array(values, np.float32),
        np.array(given_flags["endings"], np.uint8),
        np.array(given_flags["follows"]),
        GAMMA,
        LAMBDA,
    )


def test_a_stretch_worked_by_hand() -> None:
    made = worth([0.0, 1.0, 2.0], [10.0, 20.0, 30.0])
    second = 2.0 + 0.9 * 30.0 - 20.0
    first = 1.0 + 0.9 * 20.0 - 10.0 + 0.9 * 0.8 * second
    assert made.usable.tolist() == [True, True]
    np.testing.assert_allclose(made.advantages, [first, second], rtol=1e-6)
    np.testing.assert_allclose(made.returns, [first + 10.0, second + 20.0], rtol=1e-6)


def test_a_terminated_episode_is_worth_nothing_from_its_end_on_and_a_truncated_one_is() -> None:
    rewards, values = [0.0, 1.0, 5.0, 9.0], [10.0, 20.0, 30.0, 40.0]
    follows, rewarded = [False, True, False, True], [False, True, False, True]
    for ending, end_value in ((Ending.TERMINATED, 0.0), (Ending.TRUNCATED, 20.0)):
        made = worth(rewards, values, follows=follows, rewarded=rewarded, endings=[0, ending, 0, 0])
        assert made.usable.tolist() == [True, False, True]
        np.testing.assert_allclose(made.advantages, [1 + 0.9 * end_value - 10, 0, 9 + 0.9 * 40 - 30], rtol=1e-6)


def test_a_pause_is_bootstrapped_and_nothing_runs_across_it() -> None:
    made = worth([0, 1, 0, 1], [1, 2, 1000, 3], follows=[False, True, False, True], rewarded=[False, True, False, True])
    assert made.usable.tolist() == [True, False, True]
    assert made.advantages[0] == pytest.approx(1 + 0.9 * 2 - 1)


def test_a_reward_that_is_not_finite_makes_its_step_unusable() -> None:
    made = worth([0.0, float("nan"), 1.0], [1.0, 2.0, 3.0])
    assert made.usable.tolist() == [False, True]
    assert np.isfinite(made.advantages).all()


def test_arrays_that_would_broadcast_are_refused() -> None:
    flat, column = np.zeros(3, np.float32), np.zeros((3, 1), np.float32)
    flags = np.zeros(3, np.bool_)
    with pytest.raises(ValueError, match="one shape"):
        generalised_advantages(flat, flags, column, flags.astype(np.uint8), flags, GAMMA, LAMBDA)


@st.composite
def lives(draw: st.DrawFn) -> dict[str, list[Any]]:
    count = draw(st.integers(2, 12))
    number = st.floats(-5, 5, width=32)
    endings = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=count, max_size=count))
    follows = [False] + [draw(st.booleans()) and not endings[t - 1] for t in range(1, count)]
    return {
        "rewards": draw(st.lists(number, min_size=count, max_size=count)),
        "values": draw(st.lists(number, min_size=count, max_size=count)),
        "endings": endings,
        "follows": follows,
        "rewarded": follows,
    }


@given(lives())
def test_it_equals_the_sum_over_each_segment(life: dict[str, list[Any]]) -> None:
    made = worth(**life)
    count = len(life["rewards"])
    for t in range(count - 1):
        expected, weight = 0.0, 1.0
        for k in range(t, count - 1):
            if not life["follows"][k + 1]:
                break
            after = 0.0 if life["endings"][k + 1] == Ending.TERMINATED else life["values"][k + 1]
            expected += weight * (life["rewards"][k + 1] + GAMMA * after - life["values"][k])
            weight *= GAMMA * LAMBDA
        assert made.usable[t] == life["follows"][t + 1]
        assert made.advantages[t] == pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("absurd", [1e20, -1e20, 3e38])
def test_a_reward_that_no_loss_can_hold_makes_unusable_what_it_reaches(absurd: float) -> None:
    count = 400
    made = worth([0.0] * (count - 1) + [absurd], [0.0] * count)
    usable = made.usable.tolist()
    assert usable[-1] is False
    assert usable[0] is True
    assert usable == sorted(usable, reverse=True), "what lies before it, as far as it counts there"
    for column in (made.advantages, made.returns):
        assert np.isfinite(np.square(column[made.usable]).sum(dtype=np.float32))
