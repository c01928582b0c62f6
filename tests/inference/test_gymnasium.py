"""Gymnasium's environments, and tiny ones of the test's own that misbehave when told to."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from ami_inference.environments import GymnasiumEnvironment
from ami_inference.environments import gymnasium as gymnasium_module
from ami_inference.sensors.sensor import Observation
from ami_shared.config import build
from ami_shared.errors import AmiError, ConfigurationError, SensorLostError
from ami_shared.records import Ending

VECTOR = spaces.Box(-np.inf, np.inf, (2,), np.float64)


class Scripted(gymnasium.Env[Any, Any]):
    """Shows what `show` returns at the n-th step of an episode; step n gives the reward n."""

    def __init__(
        self,
        show: Any = lambda n: np.array([n, 0.5]),
        observation_space: spaces.Space[Any] = VECTOR,
        action_space: spaces.Space[Any] | None = None,
        rewards: dict[int, float] | None = None,
        terminated_at: int = 10**9,
        truncated_at: int = 10**9,
        info: dict[Any, Any] | None = None,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(3) if action_space is None else action_space
        self.show, self.rewards, self.info = show, rewards or {}, info or {}
        self.ends = (terminated_at, truncated_at)
        self.n = 0
        self.actions: list[Any] = []
        self.seeds: list[int | None] = []
        self.closed = False
        MADE.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        self.n = 0
        return self.show(0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[Any, Any]]:
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.n += 1
        reward = self.rewards.get(self.n, float(self.n))
        return self.show(self.n), reward, self.n >= self.ends[0], self.n >= self.ends[1], self.info

    def close(self) -> None:
        self.closed = True


MADE: list[Scripted] = []


@pytest.fixture(autouse=True)
def scripted() -> Iterator[None]:
    gymnasium.register("Scripted-v0", entry_point=Scripted, disable_env_checker=True)
    MADE.clear()
    yield
    del gymnasium.registry["Scripted-v0"]


def made(**options: Any) -> GymnasiumEnvironment:
    return GymnasiumEnvironment("Scripted-v0", options=options)


def pictures(shape: tuple[int, ...], high: int = 255) -> dict[str, Any]:
    space = spaces.Box(0, high, shape, np.uint8)
    return {"show": lambda n: np.full(shape, n, np.uint8), "observation_space": space}


def live(environment: GymnasiumEnvironment, steps: int, action: int = 0) -> list[Observation]:
    """Look, and act unless the episode is over."""
    seen = []
    for _ in range(steps):
        seen.append(environment.observe())
        if not seen[-1].ending:
            environment.act(np.full(len(environment.choices), action, np.int64))
    return seen


def test_cart_pole_is_made_by_its_name() -> None:
    environment = GymnasiumEnvironment("CartPole-v1")
    assert environment.choices == (2,)
    first, second = live(environment, 2)
    assert (first.values.dtype, first.values.shape) == (np.float32, (4,))
    assert (first.reward, first.stretch, first.ending) == (None, 0, Ending.NONE)
    assert second.reward == 1.0
    environment.close()


def test_the_pole_falls_and_that_is_a_terminal_end() -> None:
    environment = GymnasiumEnvironment("CartPole-v1")
    seen = live(environment, 30)
    ends = [o for o in seen if o.ending]
    assert ends
    assert {o.ending for o in ends} == {Ending.TERMINATED}
    assert all(o.reward == 1.0 for o in ends), "the last reward counts"
    environment.close()


def test_a_limit_of_time_is_no_terminal_end() -> None:
    environment = GymnasiumEnvironment("CartPole-v1", options={"max_episode_steps": 3})
    seen = live(environment, 8)
    assert [o.ending for o in seen] == [0, 0, 0, Ending.TRUNCATED] * 2
    environment.close()


def test_who_is_through_and_out_of_time_at_once_is_through() -> None:
    assert live(made(terminated_at=2, truncated_at=2), 3)[-1].ending == Ending.TERMINATED


def test_the_reward_of_an_action_comes_with_the_next_observation() -> None:
    seen = live(made(terminated_at=3), 5)
    assert [o.values[0] for o in seen] == [0, 1, 2, 3, 0]
    assert [o.reward for o in seen] == [None, 1.0, 2.0, 3.0, None]


def test_a_repeated_action_brings_the_sum_of_its_rewards() -> None:
    environment = GymnasiumEnvironment("Scripted-v0", action_repeat=3)
    seen = live(environment, 3, action=2)
    assert [o.values[0] for o in seen] == [0, 3, 6]
    assert [o.reward for o in seen] == [None, 1.0 + 2.0 + 3.0, 4.0 + 5.0 + 6.0]
    assert MADE[0].actions == [2] * 9
    assert environment.statistics()["environment_steps"] == 9


def test_a_repeated_action_ends_with_the_episode() -> None:
    environment = GymnasiumEnvironment("Scripted-v0", action_repeat=3, options={"terminated_at": 4})
    seen = live(environment, 5)
    assert [o.values[0] for o in seen] == [0, 3, 4, 0, 3]
    assert [o.reward for o in seen] == [None, 6.0, 4.0, None, 6.0]
    assert [o.ending for o in seen] == [0, 0, Ending.TERMINATED, 0, 0]
    told = {"episode_return": 10.0, "episode_length": 4, "episode_number": 1, "environment_steps": 4}
    assert environment.metrics() == told


def test_steps_are_counted_on_after_a_restore() -> None:
    first = GymnasiumEnvironment("Scripted-v0", action_repeat=3)
    live(first, 2)
    again = GymnasiumEnvironment("Scripted-v0", action_repeat=3)
    again.restore(first.state())
    live(again, 2)
    assert again.statistics()["environment_steps"] == 12


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_an_action_is_repeated_a_whole_number_of_times(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"action_repeat=.*whole number"):
        GymnasiumEnvironment("Scripted-v0", action_repeat=bad)


def test_every_episode_is_a_stretch_of_its_own() -> None:
    seen = live(made(terminated_at=2), 8)
    assert [o.stretch for o in seen] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert all(o.age_s == 0.0 for o in seen)


def test_looking_twice_shows_the_same() -> None:
    environment = made()
    live(environment, 3)
    assert environment.observe() is environment.observe()


def test_only_the_first_episode_is_seeded_and_the_others_follow() -> None:
    live(made(terminated_at=1), 6)
    assert MADE[0].seeds == [0, None, None]


def test_the_same_seed_lives_the_same_life() -> None:
    lives = []
    for seed in (3, 3, 4):
        environment = GymnasiumEnvironment("CartPole-v1", seed=seed)
        lives.append(np.stack([o.values for o in live(environment, 60)]))
        environment.close()
    np.testing.assert_array_equal(lives[0], lives[1])
    assert not np.array_equal(lives[0], lives[2])
    starts = lives[0][[0, 11]]
    assert not np.array_equal(*starts), "episodes differ"


def test_rest_and_resume_leave_time_where_it_is() -> None:
    environment = made()
    live(environment, 2)
    environment.rest()
    environment.resume()
    assert environment.observe().values[0] == 2
    assert len(MADE[0].actions) == 2


def test_episodes_are_told() -> None:
    environment = made(terminated_at=3)
    assert environment.metrics() == {}
    assert environment.statistics() == {"sensor": "gymnasium", "episodes": 0, "environment_steps": 0}
    live(environment, 3)
    assert environment.metrics() == {}
    told = {"episode_return": 6.0, "episode_length": 3}
    live(environment, 1)
    assert environment.metrics() == {**told, "episode_number": 1, "environment_steps": 3}
    live(environment, 4)
    assert environment.metrics() == {**told, "episode_number": 2, "environment_steps": 6}
    assert environment.statistics()["episodes"] == 2


def test_numbers_that_an_environment_tells_at_an_episode_s_end_are_told_as_well() -> None:
    info = {
        "score": np.float32(0.5),
        "lives": 3,
        "won": True,
        "name": "x",
        "map": np.zeros(3),
        "odd%": 1,
        "nothing": math.nan,
        "mask": 1 << 2_000,
    }
    environment = made(terminated_at=1, info=info)
    live(environment, 2)
    told = environment.metrics()
    assert {name: told[name] for name in ("episode_score", "episode_lives", "episode_won")} == {
        "episode_score": 0.5, "episode_lives": 3.0, "episode_won": 1.0
    }  # fmt: skip
    assert set(told) == {
        "episode_score", "episode_lives", "episode_won", "episode_return", "episode_length", "episode_number",
        "episode_nothing", "environment_steps",
    }  # fmt: skip


def test_pictures_are_resized_and_turned() -> None:
    show = np.zeros((50, 80, 3), np.uint8)
    show[:, :40, 0] = 200  # the left half is red
    space = spaces.Box(0, 255, show.shape, np.uint8)
    options = {"show": lambda n: show, "observation_space": space}
    seen = GymnasiumEnvironment("Scripted-v0", height=20, width=40, options=options).observe().values
    assert (seen.dtype, seen.shape, seen.flags.c_contiguous) == (np.uint8, (3, 20, 40), True)
    assert (seen[0, :, :20] == 200).all()
    assert (seen[0, :, 20:] == 0).all()
    assert (seen[1:] == 0).all()


def test_pictures_stay_as_large_as_they_come() -> None:
    assert made(**pictures((6, 9, 3))).observe().values.shape == (3, 6, 9)


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 1)])
@pytest.mark.parametrize("size", [{}, {"height": 3, "width": 4}])
def test_grey_pictures_get_three_equal_colours(shape: tuple[int, ...], size: dict[str, int]) -> None:
    environment = GymnasiumEnvironment("Scripted-v0", **size, options=pictures(shape))  # type: ignore[arg-type]
    seen = live(environment, 3)[-1].values
    assert (seen.dtype, seen.shape) == (np.uint8, (3, size.get("height", 6), size.get("width", 9)))
    assert (seen == 2).all()


@pytest.mark.parametrize("shape", [(6, 9, 4), (4, 6, 9), (2, 6, 9, 3)])
def test_pictures_that_are_neither_grey_nor_rgb_are_refused_at_once(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="neither"):
        made(**pictures(shape)).observe()


def test_one_part_of_a_dictionary_is_seen() -> None:
    space = spaces.Dict({"near": VECTOR, "far": spaces.Box(0, 255, (4, 5, 3), np.uint8)})
    options = {
        "observation_space": space,
        "show": lambda n: {"near": np.array([n, 7.0]), "far": np.full((4, 5, 3), n, np.uint8)},
    }
    near = GymnasiumEnvironment("Scripted-v0", observation_key="near", options=options)
    assert live(near, 2)[1].values.tolist() == [1.0, 7.0]
    far = GymnasiumEnvironment("Scripted-v0", observation_key="far", options=options)
    assert live(far, 2)[1].values.shape == (3, 4, 5)
    for key in (None, "nowhere"):
        with pytest.raises(ConfigurationError, match=r"far, near|near, far"):
            GymnasiumEnvironment("Scripted-v0", observation_key=key, options=options)


def test_a_key_without_a_dictionary_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="observation_key"):
        GymnasiumEnvironment("CartPole-v1", observation_key="near")


@pytest.mark.parametrize("size", [{"height": 20}, {"width": 20}, {"height": 0, "width": 20}])
def test_half_a_size_is_refused(size: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=r"height=.* width="):
        GymnasiumEnvironment("Scripted-v0", **size, options=pictures((6, 9, 3)))  # type: ignore[arg-type]


def test_a_counted_observation_is_a_vector_of_one() -> None:
    seen = made(observation_space=spaces.Discrete(5), show=lambda n: n).observe()
    assert (seen.values.dtype, seen.values.tolist()) == (np.float32, [0.0])


def test_several_action_dimensions_are_carried_out_together() -> None:
    environment = made(action_space=spaces.MultiDiscrete([3, 2, 4]))
    assert environment.choices == (3, 2, 4)
    environment.observe()
    environment.act(np.array([2, 0, 3]))
    assert MADE[0].actions[0].tolist() == [2, 0, 3]


def test_switches_are_choices_of_two() -> None:
    environment = made(action_space=spaces.MultiBinary(3))
    assert environment.choices == (2, 2, 2)
    environment.observe()
    environment.act(np.array([1, 0, 1]))
    assert MADE[-1].actions[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 6, 1), (3, 4, 6), (1, 4, 6)], ids=str)
def test_pictures_of_floating_point_numbers_become_bytes(shape: tuple[int, ...]) -> None:
    space = spaces.Box(-1.0, 1.0, shape, np.float32)
    shown = np.zeros(shape, np.float32)
    shown.flat[0], shown.flat[-1] = -1.0, 1.0
    seen = made(observation_space=space, show=lambda n: shown).observe()
    assert (seen.values.dtype, seen.values.shape) == (np.uint8, (3, 4, 6))
    assert {0, 255} <= set(seen.values.ravel().tolist()) <= {0, 128, 255}


def test_pictures_whose_channels_come_first_are_taken() -> None:
    shown = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6)
    seen = made(observation_space=spaces.Box(0, 255, (3, 4, 6), np.uint8), show=lambda n: shown).observe()
    np.testing.assert_array_equal(seen.values, shown)


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 5, 3), (4, 5)], ids=str)
def test_a_picture_stays_what_it_was_though_the_environment_writes_into_its_own_again(shape: tuple[int, ...]) -> None:
    own = np.zeros(shape, np.uint8)

    def show(n: int) -> Any:
        own[:] = n
        return own

    seen = live(made(show=show, observation_space=spaces.Box(0, 255, shape, np.uint8)), 3)
    assert [int(observation.values.max()) for observation in seen] == [0, 1, 2]


def test_a_picture_that_is_not_finite_breaks_the_episode_off() -> None:
    space = spaces.Box(0.0, 1.0, (4, 6, 3), np.float32)
    environment = made(observation_space=space, show=lambda n: np.full((4, 6, 3), np.nan, np.float32))
    with pytest.raises(SensorLostError, match="not finite"):
        environment.observe()


@pytest.mark.parametrize("bound", [np.inf, np.finfo(np.float32).max])
def test_unbounded_cubes_of_numbers_are_vectors(bound: float) -> None:
    space = spaces.Box(-bound, bound, (4, 6, 3), np.float32)
    seen = made(observation_space=space, show=lambda n: np.zeros((4, 6, 3), np.float32)).observe()
    assert (seen.values.dtype, seen.values.shape) == (np.float32, (72,))


def test_choices_that_do_not_begin_at_0_are_shifted() -> None:
    one = made(action_space=spaces.Discrete(3, start=-1))
    one.observe()
    one.act(np.array([2]))
    assert MADE[-1].actions == [1]
    several = made(action_space=spaces.MultiDiscrete([3, 2], start=[5, 1]))
    several.observe()
    several.act(np.array([2, 0]))
    assert MADE[-1].actions[0].tolist() == [7, 1]


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([[2, 2], [2, 2]]), spaces.Text(3)], ids=str
)
def test_actions_that_cannot_be_counted_are_refused(space: spaces.Space[Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"Scripted-v0.*not discrete") as caught:
        made(action_space=space)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"id": "Nowhere-v0"}, "Nowhere"),
        ({"id": "CartPole-v999"}, "CartPole"),
        ({"id": "no_such_module:Nowhere-v0"}, "no_such_module"),
        ({"id": ""}, "''"),
        ({"id": "CartPole-v1", "options": {"nope": 1}}, "nope"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_cannot_be_made_is_one_line_that_names_it(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        build({"_target_": "ami_inference.environments.GymnasiumEnvironment", **arguments}, "inference.environment")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_options_reach_the_environment_from_the_configuration() -> None:
    section = {
        "_target_": "ami_inference.environments.GymnasiumEnvironment",
        "id": "Scripted-v0",
        "seed": 5,
        "options": {"terminated_at": 2},
    }
    assert [o.ending for o in live(build(section, "inference.environment"), 3)][-1] == Ending.TERMINATED
    assert MADE[0].seeds == [5]


def test_an_environment_of_ones_own_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_place.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('my/Place-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = GymnasiumEnvironment("my_own_place:my/Place-v0")
    assert environment.observe().values.shape == (4,)
    environment.close()
    del gymnasium.registry["my/Place-v0"], sys.modules["my_own_place"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_breaks_the_episode_off(bad: float) -> None:
    environment = made(rewards={2: bad}, terminated_at=3)
    assert [o.values[0] for o in live(environment, 2)] == [0, 1]
    with pytest.raises(SensorLostError, match="reward"):
        environment.observe()
    anew = environment.observe()
    assert (anew.values[0], anew.stretch, anew.reward) == (0, 1, None)
    assert environment.metrics() == {}, "a broken episode does not count"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_observation_that_is_not_finite_breaks_the_episode_off(bad: float) -> None:
    environment = made(show=lambda n: np.array([n, bad if n == 2 else 0.0]), terminated_at=2)
    live(environment, 2)
    with pytest.raises(SensorLostError, match="observation"):
        environment.observe()
    anew = environment.observe()
    assert (anew.values[0], anew.stretch) == (0, 1)


def test_a_world_that_is_bad_from_the_first_look_is_tried_again_and_again() -> None:
    environment = made(show=lambda n: np.array([math.nan, 0.0]))
    for _ in range(3):
        with pytest.raises(SensorLostError):
            environment.observe()
    assert len(MADE[0].seeds) == 3


def test_values_too_large_for_float32_count_as_not_finite() -> None:
    with pytest.raises(SensorLostError):
        made(show=lambda n: np.array([1e300, 0.0])).observe()


@pytest.mark.parametrize(
    "space",
    [spaces.Text(8), spaces.Tuple((spaces.Discrete(3), spaces.Box(0, 1, (2, 2)))), spaces.Dict({"a": spaces.Text(4)})],
    ids=["text", "tuple", "text in a dictionary"],
)
def test_observations_that_are_neither_pictures_nor_vectors_are_refused_at_once(space: spaces.Space[Any]) -> None:
    key = "a" if isinstance(space, spaces.Dict) else None
    with pytest.raises(ConfigurationError, match="neither pictures nor vectors"):
        GymnasiumEnvironment("Scripted-v0", observation_key=key, options={"observation_space": space})


@pytest.mark.parametrize("error", [ConnectionResetError("gone"), TimeoutError("slow"), EOFError()], ids=repr)
def test_a_world_behind_a_line_that_breaks_is_lost_for_now_and_made_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = made()
    stretch = live(environment, 3)[-1].stretch

    def broken(n: int) -> Any:
        raise error

    MADE[-1].show = broken
    with pytest.raises(SensorLostError, match=type(error).__name__):
        environment.act(np.zeros(1, np.int64))
    monkeypatch.setattr(gymnasium_module.time, "monotonic", lambda: 0.0)  # no time has passed
    with pytest.raises(SensorLostError, match="environment 'Scripted-v0'"):
        environment.observe()
    assert len(MADE) == 1
    monkeypatch.undo()
    monkeypatch.setattr(gymnasium_module.time, "monotonic", lambda: math.inf)
    seen = environment.observe()
    assert (seen.beginning, seen.reward, seen.stretch) == (True, None, stretch + 1)
    assert (MADE[0].closed, len(MADE), MADE[1].seeds) == (True, 2, [0])


def test_a_world_that_is_not_there_yet_is_no_error_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(id: str, **options: Any) -> Any:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(gymnasium, "make", refused)
    with pytest.raises(AmiError, match=r"environment 'Scripted-v0' cannot be made: ConnectionRefusedError") as caught:
        GymnasiumEnvironment("Scripted-v0")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("reward", [None, "much", np.ones(2)], ids=str)
def test_a_reward_that_is_no_number_is_a_configuration_error(reward: Any) -> None:
    environment = made(rewards={1: reward, 2: np.ones(1)})
    environment.observe()
    with pytest.raises(ConfigurationError, match=r"'Scripted-v0': its reward .* is not a number"):
        environment.act(np.zeros(1, np.int64))


def test_a_reward_in_an_array_is_taken() -> None:
    assert live(made(rewards={1: np.full(1, 2.5)}), 2)[1].reward == 2.5


def test_a_restored_seed_stays_in_its_range() -> None:
    environment = GymnasiumEnvironment("Scripted-v0", seed=(1 << 32) - 2)
    environment.restore({"episodes": 5, "steps": 9})
    environment.observe()
    assert MADE[-1].seeds == [3]


def test_closing_closes_the_environment() -> None:
    environment = made()
    environment.close()
    assert MADE[0].closed


def test_the_first_observation_of_each_episode_says_so() -> None:
    seen = live(GymnasiumEnvironment("CartPole-v1"), 60)
    begins = [True, *(bool(before.ending) for before in seen[:-1])]
    assert [observation.beginning for observation in seen] == begins
    assert sum(begins) > 1
