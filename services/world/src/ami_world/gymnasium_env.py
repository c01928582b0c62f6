"""The simulated place as a Gymnasium environment: the same game, avatar and speeds, without sockets or real time.

Importing this module registers `ami_world/Doom-v0`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ami_world.doom import DoomWorld
from ami_world.exploration import Exploration, reachable_cells
from ami_world.inputs import HeldInputs, movement
from ami_world.settings import TIC_RATE, WorldSettings

STEPS_A_SECOND = 10
STRETCH_STEPS = 100_000
AXIS = (0.0, 1.0, -1.0)

Frame = NDArray[np.uint8]


class DoomEnv(gymnasium.Env[Frame, NDArray[np.int64]]):
    """Ten steps per second of game time, VRChat's five discrete choices, and no reward: a place for curiosity.

    For comparison only, exploration itself can be rewarded.
    For measurement only, each `info` has the share of the reachable floor that the episode has visited so far,
    `explored_share`, and that of all episodes in the present stretch of STRETCH_STEPS steps, `stretch_explored_share`.
    """

    def __init__(self, episode_tics: int = 2_100, reward_of_a_cell: float = 0.0, **settings: Any) -> None:
        """Check the settings; the game starts with reset().

        Args:
            episode_tics: game tics of an episode, 35 a second, after which it is truncated; the scenario's own limit is
                2,100.
            reward_of_a_cell: reward for each cell of the floor that the episode has not visited before.
            settings: as in the section `world` of the configuration.
        """
        self._settings = WorldSettings(**{"width": 160, "height": 120, **settings})
        self._episode_tics, self._reward_of_a_cell = episode_tics, float(reward_of_a_cell)
        side = min(self._settings.width, self._settings.height)
        self.observation_space = spaces.Box(0, 255, (side, side, 3), np.uint8)
        self.action_space = spaces.MultiDiscrete([3, 3, 3, 2, 2])
        self._world: DoomWorld | None = None
        self._inputs = HeldInputs()
        self._tics = self._steps = self._lived = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:
        super().reset(seed=seed)
        if self._world is None:
            settings = self._settings if seed is None else WorldSettings(**{**vars(self._settings), "seed": seed})
            self._world = DoomWorld(settings)
            moment = self._world.moment()
            self._floor = reachable_cells(self._world.sectors(), (moment.x, moment.y), settings.cell_size)
            self._stretch = Exploration(settings.cell_size, self._floor)
        else:
            self._world.begin_anew()
        self._episode = Exploration(self._settings.cell_size, self._floor)
        self._inputs, self._tics, self._steps = HeldInputs(), 0, 0
        return self._look(), self._info()

    def step(self, action: NDArray[np.int64]) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        assert self._world is not None, "call reset() first"
        for address, value in (
            ("/input/Vertical", AXIS[action[0]]),
            ("/input/Horizontal", AXIS[action[1]]),
            ("/input/LookHorizontal", AXIS[action[2]]),
            ("/input/Jump", int(action[3])),
            ("/input/Run", int(action[4])),
        ):
            self._inputs = self._inputs.receive(address, value)
        self._steps += 1
        if self._lived % STRETCH_STEPS == 0:
            self._stretch = Exploration(self._settings.cell_size, self._floor)
        self._lived += 1
        visited = self._episode.visited
        while self._tics < self._steps * TIC_RATE // STEPS_A_SECOND:
            moment = self._world.step(movement(self._inputs, self._settings.gait))
            self._inputs = self._inputs.after_tic()
            self._episode.visit(moment.x, moment.y)
            self._stretch.visit(moment.x, moment.y)
            self._tics += 1
        reward = self._reward_of_a_cell * (self._episode.visited - visited)
        return self._look(), reward, False, self._tics >= self._episode_tics, self._info()

    def _look(self) -> Frame:
        """Return the central square of the picture, (S, S, 3) uint8 RGB."""
        assert self._world is not None
        picture = self._world.moment().picture
        height, width = picture.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return np.ascontiguousarray(picture[top : top + side, left : left + side, ::-1])

    def _info(self) -> dict[str, Any]:
        return {"explored_share": self._episode.share, "stretch_explored_share": self._stretch.share}

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None


gymnasium.register("ami_world/Doom-v0", entry_point=DoomEnv)
