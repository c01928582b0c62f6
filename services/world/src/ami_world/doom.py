"""The game itself: VizDoom as an endless place; each tic takes a Movement and returns a Moment.

It knows nothing of sockets or real time. The engine is a child process, which never outlives this one.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import vizdoom
from numpy.typing import NDArray
from vizdoom import Button, GameVariable

from ami_shared.errors import AmiError, ConfigurationError
from ami_shared.files import lock_folder
from ami_world.exploration import Edge, Sector
from ami_world.inputs import Movement
from ami_world.settings import TIC_RATE, WorldSettings

ENGINE = Path(vizdoom.exe_path).resolve()
FOLDER_PREFIX = "ami-world-"
ABANDONED_AFTER_S = 60.0
DELTA_PER_SPEED = 3.0 / TIC_RATE  # a delta of 25, Doom's walk, settles at 291.7 map units a second
KEEP_THE_GOAL = "give BlueArmor"  # the goal is a green armour, which is not picked up by a player who has a better one
ENGINE_ERRORS = (
    vizdoom.ViZDoomErrorException,
    vizdoom.ViZDoomUnexpectedExitException,
    vizdoom.FileDoesNotExistException,
    vizdoom.SharedMemoryException,
    vizdoom.MessageQueueException,
)
ARGUMENTS, INSTANCE = "arguments", "+viz_instance_id"
SHARED_MEMORY = Path("/dev/shm")
BUTTONS = [
    Button.MOVE_FORWARD_BACKWARD_DELTA,
    Button.MOVE_LEFT_RIGHT_DELTA,
    Button.TURN_LEFT_RIGHT_DELTA,
    Button.JUMP,
]
VARIABLES = [
    GameVariable.POSITION_X,
    GameVariable.POSITION_Y,
    GameVariable.POSITION_Z,
    GameVariable.ANGLE,
]


class EngineError(AmiError):
    """The VizDoom engine did not start, or is gone."""


@dataclass(frozen=True)
class Moment:
    """The result of one tic. Angles are in degrees and grow to the left: 0 is east, 90 is north."""

    x: float
    y: float
    z: float
    angle_deg: float
    picture: NDArray[np.uint8]  # (H, W, 3) uint8, BGR as in OpenCV


def remove_abandoned_folders(temporary: Path, now: float) -> None:
    """Remove the folders of killed worlds, except new ones: a world that is starting has not locked its folder yet."""
    for folder in temporary.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError, ConfigurationError):
            if now - folder.stat().st_mtime > ABANDONED_AFTER_S:
                lock_folder(folder, "world").close()
                remove_shared_memory(folder)
                shutil.rmtree(folder)


def remove_shared_memory(folder: Path) -> None:
    """Remove the shared memory of the engine that was started in this folder, if it still exists."""
    with contextlib.suppress(OSError):
        words = (folder / ARGUMENTS).read_text().split()
        instance = words[words.index(INSTANCE) + 1] if INSTANCE in words[:-1] else ""
        for left in SHARED_MEMORY.glob(f"ViZDoom*{glob.escape(instance)}") if instance.isalnum() else ():
            left.unlink()


class DoomWorld:
    """A running game, used as a context manager; it starts a new episode whenever one ends."""

    def __init__(self, settings: WorldSettings) -> None:
        scenario = find_scenario(settings.scenario)
        remove_abandoned_folders(Path(tempfile.gettempdir()), time.time())
        # On Windows the ending engine or a virus scanner may have a file open: the next start removes what is left.
        self._folder = tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True)
        self._lock = lock_folder(Path(self._folder.name), "world")
        self._game = vizdoom.DoomGame()
        self.episodes = 0
        try:
            _configure(self._game, scenario, settings, Path(self._folder.name))
            self._game.init()
            self._begin_episode()
        except ENGINE_ERRORS as error:
            self.close()
            reason = " ".join(str(error).split())
            raise EngineError(f"VizDoom did not start {scenario} ({reason}): check world.scenario") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DoomWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and remove its folder."""
        self._game.close()
        self._lock.close()
        self._folder.cleanup()

    def step(self, move: Movement) -> Moment:
        """Run one tic and return its result.

        Raises:
            EngineError: the engine is gone.
        """
        with told_of_engine():
            self._game.make_action(
                [
                    move.forward * DELTA_PER_SPEED,
                    move.right * DELTA_PER_SPEED,
                    move.turn_right / TIC_RATE,
                    move.jump,
                ]
            )
            if self._game.is_episode_finished() or self._game.is_player_dead():
                self._game.new_episode()
                self._begin_episode()
        return self.moment()

    def begin_anew(self) -> None:
        """Begin a new episode, at another of the scenario's start places.

        Raises:
            EngineError: the engine is gone.
        """
        with told_of_engine():
            self._game.new_episode()
            self._begin_episode()

    def moment(self) -> Moment:
        """Return the present moment; picture (H, W, 3) uint8 BGR.

        Raises:
            EngineError: the engine is gone, or shows nothing.
        """
        state = self._state()
        x, y, z, angle = np.asarray(state.game_variables, dtype=float).tolist()
        return Moment(x, y, z, angle, state.screen_buffer)

    def sectors(self) -> tuple[Sector, ...]:
        """Return the map's floor plan."""
        return tuple(
            Sector(
                sector.floor_height,
                sector.ceiling_height,
                tuple(Edge(line.x1, line.y1, line.x2, line.y2, line.is_blocking) for line in sector.lines),
            )
            for sector in self._state().sectors
        )

    def _begin_episode(self) -> None:
        self._game.send_game_command(KEEP_THE_GOAL)
        self.episodes += 1

    def _state(self) -> vizdoom.GameState:
        state = self._game.get_state()
        if state is None:
            raise EngineError("the game shows nothing right after its start: try another world.scenario=")
        return state


@contextlib.contextmanager
def told_of_engine() -> Iterator[None]:
    """Turn VizDoom's errors for a dead engine into EngineError."""
    try:
        yield
    except ENGINE_ERRORS as error:
        raise EngineError(f"the VizDoom engine is gone ({error}): start this service again") from None


def find_scenario(name: str) -> Path:
    """Return the path of a packaged scenario, or `name` itself if it is a path; raise ConfigurationError otherwise."""
    folder = Path(vizdoom.scenarios_path)
    for path in (Path(name), folder / name, folder / f"{name}.cfg", folder / f"{name}.wad"):
        if path.suffix in (".cfg", ".wad") and path.is_file():
            return path.resolve()
    packaged = ", ".join(sorted(path.stem for path in folder.glob("*.cfg")))
    raise ConfigurationError(
        f"world.scenario={name!r} was not found: give the path of a .cfg or .wad file, or one of {packaged}"
    )


def _configure(game: vizdoom.DoomGame, scenario: Path, settings: WorldSettings, folder: Path) -> None:
    if scenario.suffix == ".wad":
        game.set_doom_scenario_path(str(scenario))
    elif not game.load_config(str(scenario)):
        raise ConfigurationError(f"world.scenario: VizDoom cannot load {scenario}: correct the file")
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_vizdoom_path(str(_write_launcher(folder)))
    game.set_doom_config_path(str(folder / "engine.ini"))
    game.add_game_args("+sv_cheats 1")  # for KEEP_THE_GOAL
    game.set_seed(settings.seed)
    game.set_episode_timeout(0)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.__members__[settings.resolution])
    game.set_screen_format(vizdoom.ScreenFormat.BGR24)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.set_render_messages(False)
    game.set_sectors_info_enabled(True)
    game.set_available_buttons(BUTTONS)
    game.set_available_game_variables(VARIABLES)


def _write_launcher(folder: Path) -> Path:
    """Write the script that starts the engine in `folder`, where it leaves files, and that ends it with this process.

    Windows has no such scripts: there the engine is started directly, and leaves files in the working directory.
    """
    if os.name == "nt":
        return ENGINE
    leash = "setpriv --pdeathsig KILL " if shutil.which("setpriv") else ""
    place, engine = shlex.quote(str(folder)), shlex.quote(str(ENGINE))
    launcher = folder / "engine"
    remember = f'echo "$*" > {ARGUMENTS}'  # the arguments name its shared memory
    launcher.write_text(f'#!/bin/sh\ncd {place} || exit 1\n{remember}\nexec {leash}{engine} "$@"\n')
    launcher.chmod(0o700)
    for program in (ENGINE, launcher):  # otherwise VizDoom would end in a segmentation fault
        if not os.access(program, os.X_OK):
            raise EngineError(
                f"{program} may not be executed: allow it, or set TMPDIR to a folder that permits execution"
            )
    if missing := missing_libraries(ENGINE):
        raise EngineError(f"{ENGINE} needs {', '.join(missing)}: install the packages that provide them")
    return launcher


def missing_libraries(program: Path) -> list[str]:
    """Return the shared libraries of a program that this machine lacks, according to Linux's dynamic linker."""
    if not sys.platform.startswith("linux"):
        return []
    environment = {**os.environ, "LD_TRACE_LOADED_OBJECTS": "1"}
    try:
        told = subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split()[0] for line in told.stdout.splitlines() if line.rstrip().endswith("not found")]
