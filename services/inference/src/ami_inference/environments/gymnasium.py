"""Any environment of Gymnasium, by its registered name: a world that waits for the agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium import spaces

from ami_inference.sensors.sensor import Observation
from ami_shared.errors import ConfigurationError, SensorLostError
from ami_shared.records import Ending
from ami_shared.wire import Array


class GymnasiumEnvironment:
    """One Gymnasium environment: images or vectors in, discrete actions out, each episode a segment of its own."""

    def __init__(
        self,
        id: str,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        observation_key: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:
        id: registered name, e.g. CartPole-v1; or module:name, where importing the module registers it.
        seed: of the first episode; the others follow from it.
        height, width: pixels that images are resized to; None = as they come.
        observation_key: which part of a dictionary of observations the agent sees.
        options: passed on to the environment's constructor.
        """
        try:
            self._env = gymnasium.make(id, **dict(options or {}))
        except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
            raise ConfigurationError(f"environment {id!r}: {' '.join(str(error).split())}") from None
        self._key, self._size = observation_key, (width, height) if width and height else None
        self.choices = choices_of(self._env.action_space, id)
        self._joint = isinstance(self._env.action_space, spaces.MultiDiscrete)
        self._first = int(getattr(self._env.action_space, "start", 0)) if not self._joint else 0
        self._seed: int | None = seed
        self._next: Observation | None = None
        self._stretch = -1
        self._return, self._length = 0.0, 0
        self._info: Mapping[str, Any] = {}
        self._finished: dict[str, float] = {}
        self.episodes = 0

    def observe(self) -> Observation:
        if self._next is None:
            self._begin_episode()
        observation = self._next
        assert observation is not None
        if observation.reward is not None and not np.isfinite(observation.reward):
            self._next = None
            raise SensorLostError(f"the environment gave a reward of {observation.reward}")
        if observation.ending:
            self._next = None
            self._finish(self._info)
        return observation

    def _begin_episode(self) -> None:
        seen, _ = self._env.reset(seed=self._seed)
        self._seed = None
        self._stretch += 1
        self._return, self._length = 0.0, 0
        self._next = Observation(self._values(seen), 0.0, self._stretch)

    def _finish(self, info: Mapping[str, Any]) -> None:
        self.episodes += 1
        told = {name: float(value) for name, value in info.items() if isinstance(value, int | float)}
        counted = {"return": self._return, "length": self._length, "number": self.episodes}
        self._finished = {f"episode_{name}": value for name, value in (told | counted).items()}

    def act(self, action: Array) -> None:
        chosen = action + self._first if self._joint else int(action[0]) + self._first
        seen, reward, terminated, truncated, self._info = self._env.step(chosen)
        ending = Ending.TERMINATED if terminated else Ending.TRUNCATED if truncated else Ending.NONE
        self._return += float(reward)
        self._length += 1
        self._next = Observation(self._values(seen), 0.0, self._stretch, float(reward), ending)

    def _values(self, seen: Any) -> Array:
        """Return an image as (3, H, W) uint8, anything else as a vector of float32."""
        values = np.asarray(seen[self._key] if self._key is not None else seen)
        if values.ndim < 2 or values.dtype != np.uint8:
            return values.astype(np.float32).reshape(-1)
        if values.ndim == 2:
            values = np.repeat(values[:, :, None], 3, axis=2)
        if self._size and (values.shape[1], values.shape[0]) != self._size:
            values = cv2.resize(values, self._size, interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def rest(self) -> None:
        """Time stands still between two actions anyway."""

    def resume(self) -> None:
        """Nothing was let go of."""

    def metrics(self) -> Mapping[str, float]:
        return self._finished

    def statistics(self) -> Mapping[str, Any]:
        return {"sensor": "gymnasium", "episodes": self.episodes}

    def close(self) -> None:
        self._env.close()


def choices_of(space: spaces.Space[Any], id: str) -> tuple[int, ...]:
    """Return the number of choices of each action dimension; raise ConfigurationError where they are not counted."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return tuple(int(n) for n in space.nvec)
    raise ConfigurationError(f"environment {id!r}: actions {space} are not discrete")
