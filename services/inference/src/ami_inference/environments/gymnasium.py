"""Any Gymnasium environment, by its registered name: a world that waits for the agent."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium import spaces

from ami_inference.sensors.sensor import Observation
from ami_shared.errors import AmiError, ConfigurationError, NotFiniteError, SensorLostError
from ami_shared.records import Ending
from ami_shared.wire import Array

CHANNELS = (1, 3)
REMAKE_AFTER_S = 1.0
TELLABLE = re.compile(r"[\w. -]+")  # suitable as the name of a metric


class GymnasiumEnvironment:
    """One Gymnasium environment: images or vectors in, discrete actions out, each episode a segment of its own."""

    waits = True

    def __init__(
        self,
        id: str,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        observation_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        action_repeat: int = 1,
    ) -> None:
        """Make the environment and check that an agent can live in it.

        Args:
            id: registered name, e.g. CartPole-v1; or module:name, where importing the module registers it.
            seed: of the first episode; it determines the others too.
            height: to which images are resized, in pixels; None = unchanged.
            width: to which images are resized, in pixels; None = unchanged.
            observation_key: which part of a dictionary of observations the agent sees.
            options: keyword arguments of the environment's constructor.
            action_repeat: steps of the environment for which each action is carried out, until the episode's end; the
                agent sees the last of them, with the sum of their rewards.

        Raises:
            ConfigurationError: there is no such environment, or its observations or actions are not supported.
        """
        if type(action_repeat) is not int or action_repeat < 1:
            raise ConfigurationError(
                f"inference.environment.action_repeat={action_repeat!r} must be a whole number, 1 or more"
            )
        self._make = partial(gymnasium.make, id, **dict(options or {}))
        try:
            self._env = self._make()
        except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
            raise ConfigurationError(f"environment {id!r}: {' '.join(str(error).split())}") from None
        except (OSError, EOFError) as error:  # a remote world that is not there yet
            raise AmiError(f"environment {id!r} cannot be made: {type(error).__name__}: {error}") from None
        self._id, self._key, self._size = id, observation_key, size_of(height, width)
        check_observations(self._env.observation_space, observation_key, id)
        self._range = range_of_picture(self._env.observation_space, observation_key)
        self._check_sample()
        self.choices = choices_of(self._env.action_space, id)
        joint = isinstance(self._env.action_space, spaces.MultiDiscrete | spaces.MultiBinary)
        self._joint = self._env.action_space.dtype if joint else None
        self._first = getattr(self._env.action_space, "start", 0)
        self._repeat = action_repeat
        self._first_seed = seed
        self._seed: int | None = seed
        self._broken, self._made_again_at = "", 0.0
        self._next: Observation | None = None
        self._stretch = -1
        self._return, self._length = 0.0, 0
        self._info: Mapping[str, Any] = {}
        self._finished: dict[str, float] = {}
        self.episodes = self.steps = 0

    def _check_sample(self) -> None:
        """Raise ConfigurationError if observations are neither pictures nor vectors."""
        sample = self._env.observation_space.sample()
        try:
            if self._chosen(sample).dtype.kind not in "biuf":
                raise TypeError
            self._values(sample)
        except (TypeError, ValueError):
            space = " ".join(str(self._env.observation_space).split())
            raise ConfigurationError(
                f"environment {self._id!r}: observations {space:.200} are neither pictures nor vectors of numbers"
            ) from None

    def observe(self) -> Observation:
        if self._next is None:
            self._begin_episode()
        observation = self._next
        assert observation is not None
        if trouble := trouble_with(observation):
            self._next = None
            raise NotFiniteError(trouble)
        if observation.ending:
            self._next = None
            self._finish(self._info)
        return observation

    def _begin_episode(self) -> None:
        if self._broken:
            self._make_again()
        with self._away():
            seen, _ = self._env.reset(seed=self._seed)
        self._seed = None
        self._stretch += 1
        self._return, self._length = 0.0, 0
        self._next = Observation(self._values(seen), 0.0, self._stretch, beginning=True)

    def _finish(self, info: Mapping[str, Any]) -> None:
        self.episodes += 1
        told = {}
        for name, value in info.items():
            if isinstance(value, Real) and TELLABLE.fullmatch(str(name)):
                with contextlib.suppress(OverflowError):  # huge integers: a hash, a mask
                    told[str(name)] = float(value)
        counted = {"return": self._return, "length": self._length, "number": self.episodes}
        self._finished = {f"episode_{name}": value for name, value in (told | counted).items()}
        self._finished["environment_steps"] = float(self.steps)

    def act(self, action: Array) -> None:
        """Carry out one action, (len(choices),) int64, for `action_repeat` steps or until the episode's end."""
        chosen = (action + self._first).astype(self._joint) if self._joint else int(action[0] + self._first)
        total = 0.0
        for _ in range(self._repeat):
            with self._away():
                seen, reward, terminated, truncated, self._info = self._env.step(chosen)
            total += self._number(reward)
            self._length += 1
            self.steps += 1
            if terminated or truncated:
                break
        self._return += total
        ending = Ending.TERMINATED if terminated else Ending.TRUNCATED if truncated else Ending.NONE
        self._next = Observation(self._values(seen), 0.0, self._stretch, total, ending)

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        """Handle a remote world whose connection breaks: it is lost for now, and so is its episode."""
        try:
            yield
        except (OSError, EOFError) as error:
            self._next = None
            self._broken = f"environment {self._id!r}: {type(error).__name__}: {error}"
            self._made_again_at = time.monotonic() + REMAKE_AFTER_S
            raise SensorLostError(self._broken) from None

    def _make_again(self) -> None:
        """Replace a world that broke by a new one, once it has had a moment to come back."""
        if time.monotonic() < self._made_again_at:
            raise SensorLostError(self._broken)
        with self._away():
            with contextlib.suppress(Exception):  # whatever is left of it
                self._env.close()
            self._env = self._make()
        self._broken, self._seed = "", self._seed_now()

    def _seed_now(self) -> int:
        """Return the seed of a world that is made after so many episodes."""
        return (self._first_seed + self.episodes) % (1 << 32)

    def _number(self, reward: Any) -> float:
        try:
            return float(reward.item() if hasattr(reward, "item") else reward)
        except (TypeError, ValueError):
            raise ConfigurationError(f"environment {self._id!r}: its reward {reward!r:.80} is not a number") from None

    def _chosen(self, seen: Any) -> Array:
        """Return the part of the observations that the agent sees, as it is."""
        return np.asarray(seen[self._key] if self._key is not None else seen)

    def _values(self, seen: Any) -> Array:
        """Return an image as (3, H, W) uint8, anything else as a vector (D,) float32."""
        values = self._chosen(seen)
        if self._range and np.isfinite(values).all():
            low, high = self._range
            values = np.clip((values - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
        if values.ndim < 2 or values.dtype != np.uint8:
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is reported
                return values.astype(np.float32).reshape(-1)
        values = values[:, :, None] if values.ndim == 2 else values
        if values.ndim == 3 and values.shape[0] in CHANNELS and values.shape[2] not in CHANNELS:
            values = values.transpose(1, 2, 0)
        if values.ndim != 3 or values.shape[2] not in CHANNELS:
            raise ConfigurationError(
                f"inference.environment: pictures of shape {values.shape} have neither one channel nor three"
            )
        if values.shape[2] == 1:
            values = np.repeat(values, 3, axis=2)
        if self._size and (values.shape[1], values.shape[0]) != self._size:
            values = cv2.resize(values, self._size, interpolation=cv2.INTER_AREA)
        return np.array(values.transpose(2, 0, 1), order="C")  # a copy: the environment may reuse its array

    def rest(self) -> None:
        """Do nothing: time stands still between two actions anyway."""

    def resume(self) -> None:
        """Do nothing: nothing was released."""

    def state(self) -> Mapping[str, Any]:
        """Return counters only: Gymnasium environments cannot be saved; a restored body begins a new episode."""
        return {"episodes": self.episodes, "steps": self.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.episodes, self.steps = int(state["episodes"]), int(state.get("steps", 0))
        if self._seed is not None:
            self._seed = self._seed_now()

    def metrics(self) -> Mapping[str, float]:
        return self._finished

    def statistics(self) -> Mapping[str, Any]:
        return {"sensor": "gymnasium", "episodes": self.episodes, "environment_steps": self.steps}

    def close(self) -> None:
        self._env.close()


def trouble_with(observation: Observation) -> str | None:
    """Return what is not finite about an observation; None if all is finite."""
    if observation.reward is not None and not math.isfinite(observation.reward):
        return f"the environment gave a reward of {observation.reward}"
    if not np.isfinite(observation.values).all():
        return "the environment gave an observation that is not finite"
    return None


def size_of(height: int | None, width: int | None) -> tuple[int, int] | None:
    """Return the size to resize pictures to, (width, height) as in OpenCV; None = unchanged."""
    if height is None and width is None:
        return None
    if not (height and width and height > 0 and width > 0):
        raise ConfigurationError(
            f"inference.environment: height={height} and width={width} must both be pixels, or both null"
        )
    return width, height


def range_of_picture(space: spaces.Space[Any], key: str | None) -> tuple[Array, Array] | None:
    """Return the lowest and highest values of floating-point pictures; None for other observations."""
    seen = space[key] if isinstance(space, spaces.Dict) and key is not None else space
    if not isinstance(seen, spaces.Box) or not np.issubdtype(seen.dtype, np.floating):
        return None
    picture = len(seen.shape) == 3 and (seen.shape[2] in CHANNELS or seen.shape[0] in CHANNELS)
    with np.errstate(over="ignore"):
        span = seen.high - seen.low
    return (seen.low, seen.high) if picture and np.isfinite(span).all() and (span > 0).all() else None


def check_observations(space: spaces.Space[Any], key: str | None, id: str) -> None:
    """Raise ConfigurationError if it is not clear which part of the observations the agent sees."""
    if isinstance(space, spaces.Dict) and key not in space.spaces:
        names = ", ".join(map(str, space.spaces))
        raise ConfigurationError(f"environment {id!r}: observation_key={key!r} must be one of {names}")
    if key is not None and not isinstance(space, spaces.Dict):
        raise ConfigurationError(f"environment {id!r}: observation_key={key!r}, but observations are {space}")


def choices_of(space: spaces.Space[Any], id: str) -> tuple[int, ...]:
    """Return the number of choices of each action dimension; raise ConfigurationError if they are not discrete."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return tuple(int(n) for n in space.nvec)
    if isinstance(space, spaces.MultiBinary) and isinstance(space.n, int | np.integer):
        return (2,) * int(space.n)
    raise ConfigurationError(f"environment {id!r}: actions {' '.join(str(space).split())} are not discrete")
