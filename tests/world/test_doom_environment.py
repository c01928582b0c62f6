"""The simulated place as a Gymnasium environment: what it tells of where its episodes have been."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ami_inference.actuators.controls import CHOICES, targets
from ami_world import gymnasium_env
from ami_world.gymnasium_env import DoomEnv
from ami_world.inputs import HeldInputs

FORWARD, STILL = np.array([1, 0, 0, 0, 1]), np.zeros(5, np.int64)


def test_the_share_of_a_stretch_is_that_of_all_its_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium_env, "STRETCH_STEPS", 60)
    environment = DoomEnv(episode_tics=105)  # 30 steps
    environment.reset(seed=1)
    first = [environment.step(FORWARD) for _ in range(30)]
    assert [truncated for *_, truncated, _ in first] == [False] * 29 + [True]
    told = first[-1][4]
    assert 0.0 < told["explored_share"] == told["stretch_explored_share"]
    environment.reset()
    second = [environment.step(STILL)[4] for _ in range(30)]
    assert second[-1]["explored_share"] < told["explored_share"] <= second[-1]["stretch_explored_share"]
    environment.reset()
    anew = environment.step(STILL)[4]
    assert anew["stretch_explored_share"] < told["explored_share"], "another stretch has begun"
    environment.close()


def test_every_choice_means_what_it_means_in_vrchat() -> None:
    environment, held = DoomEnv(), HeldInputs()
    environment.reset(seed=1)
    for action in itertools.product(*map(range, CHOICES)):
        environment.step(np.array(action))
        for address, value in targets(np.array(action), (1.0, 1.0, 1.0)).items():
            held = held.receive(address, value)
        held = held.after_tic()
        assert environment._inputs == held, action
    environment.close()


@pytest.mark.parametrize("paid", [0.0, 0.5])
def test_exploring_is_paid_only_where_that_is_asked_for(paid: float) -> None:
    environment = DoomEnv(reward_of_a_cell=paid)
    environment.reset(seed=1)
    rewards = [float(environment.step(FORWARD)[1]) for _ in range(30)]
    assert environment._episode.visited > 5
    assert sum(rewards) == paid * environment._episode.visited
    environment.reset()
    again = float(environment.step(FORWARD)[1])
    assert again == paid * environment._episode.visited, "every episode is paid for anew"
    environment.close()
