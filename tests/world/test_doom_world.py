from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ami_shared.files import lock_folder
from ami_world import doom as doom_module
from ami_world.doom import (
    ABANDONED_AFTER_S,
    ENGINE,
    FOLDER_PREFIX,
    DoomWorld,
    EngineError,
    Moment,
    missing_libraries,
    remove_abandoned_folders,
)
from ami_world.inputs import Movement
from ami_world.settings import TIC_RATE, WorldSettings

pytestmark = pytest.mark.filterwarnings("error")

SEED_NORTH_OF_THE_GOAL = 2
GOAL = (1040.0, -352.0)
STILL = Movement()


@pytest.fixture
def doom() -> Iterator[DoomWorld]:
    with DoomWorld(WorldSettings(seed=SEED_NORTH_OF_THE_GOAL)) as doom:
        yield doom


def face(doom: DoomWorld, angle_deg: float) -> Moment:
    """Turn until the avatar looks this way."""
    for _ in range(4 * TIC_RATE):
        moment = doom.moment()
        right = (moment.angle_deg - angle_deg + 180) % 360 - 180
        if abs(right) < 0.5:
            return moment
        doom.step(Movement(turn_right=max(-120.0, min(120.0, right * TIC_RATE))))
    raise AssertionError(f"never turned to {angle_deg}, still at {moment.angle_deg}")


def walk(doom: DoomWorld, move: Movement, tics: int) -> Moment:
    for _ in range(tics):
        moment = doom.step(move)
    return moment


def test_without_movement_the_avatar_stands_still(doom: DoomWorld) -> None:
    before, after = doom.moment(), walk(doom, STILL, 2 * TIC_RATE)
    assert (after.x, after.y, after.z, after.angle_deg) == (before.x, before.y, before.z, before.angle_deg)


def test_forward_goes_where_the_avatar_looks_and_right_to_its_right(doom: DoomWorld) -> None:
    start = face(doom, 270.0)
    south = walk(doom, Movement(forward=200.0), 10)
    assert south.y < start.y - 10
    assert abs(south.x - start.x) < 2
    settled = walk(doom, STILL, TIC_RATE)
    west = walk(doom, Movement(right=200.0), 5)
    assert west.x < settled.x - 2
    assert abs(west.y - settled.y) < 2


def test_the_avatar_turns_right_at_the_speed_asked_for(doom: DoomWorld) -> None:
    before, after = doom.moment(), walk(doom, Movement(turn_right=120.0), TIC_RATE)
    assert (before.angle_deg - after.angle_deg) % 360 == pytest.approx(120.0, abs=0.5)


@pytest.mark.parametrize("speed", [290.0, 580.0])
def test_the_avatar_reaches_the_speed_asked_for(doom: DoomWorld, speed: float) -> None:
    face(doom, 270.0)
    positions = [walk(doom, STILL, 5), *(doom.step(Movement(forward=speed)) for _ in range(30))]
    steps = [math.dist((a.x, a.y), (b.x, b.y)) for a, b in pairwise(positions)]
    assert max(steps) * TIC_RATE == pytest.approx(speed, rel=0.1)


def test_a_jump_leaves_the_floor_and_lands_again(doom: DoomWorld) -> None:
    heights = [doom.step(Movement(jump=True)).z, *(doom.step(STILL).z for _ in range(TIC_RATE))]
    assert max(heights) > 20
    assert heights[-1] == 0.0


def test_reaching_the_goal_ends_nothing(doom: DoomWorld) -> None:
    face(doom, 270.0)
    way = [doom.step(Movement(forward=290.0)) for _ in range(70)]
    nearest = min(math.dist((moment.x, moment.y), GOAL) for moment in way)
    assert nearest < 10
    assert doom.episodes == 1


def test_there_is_no_time_limit(doom: DoomWorld) -> None:
    walk(doom, Movement(turn_right=10.0), 2200)
    assert doom.episodes == 1


def test_after_a_death_life_goes_on_in_a_new_episode(doom: DoomWorld) -> None:
    doom._game.send_game_command("kill")
    walk(doom, STILL, 5)
    assert doom.episodes == 2
    assert walk(doom, Movement(turn_right=120.0), 5).picture.any()


def test_one_seed_gives_one_start_and_other_seeds_others() -> None:
    starts = []
    for seed in (3, 3, 4):
        with DoomWorld(WorldSettings(seed=seed)) as doom:
            moment = doom.moment()
            starts.append((moment.x, moment.y, moment.angle_deg))
    assert starts[0] == starts[1] != starts[2]


def test_pictures_have_the_configured_size() -> None:
    with DoomWorld(WorldSettings(width=160, height=120)) as doom:
        picture = doom.moment().picture
    assert (picture.shape, picture.dtype) == ((120, 160, 3), np.uint8)


def test_the_shared_memory_of_a_killed_engine_is_removed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doom_module, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    for name in ("ViZDoomSMabc1", "ViZDoomMQCtrabc1", "ViZDoomMQDoomabc1", "ViZDoomSMother", "else-abc1"):
        (tmp_path / "shm" / name).write_bytes(b"x")
    for n, told in enumerate(("+map map01 +viz_instance_id abc1 +x", "+viz_instance_id", "+viz_instance_id *", "")):
        folder = tmp_path / f"{FOLDER_PREFIX}{n}"
        folder.mkdir()
        (folder / "arguments").write_text(told)
    remove_abandoned_folders(tmp_path, time.time() + 2 * ABANDONED_AFTER_S)
    assert sorted(path.name for path in (tmp_path / "shm").iterdir()) == ["ViZDoomSMother", "else-abc1"]
    assert [path.name for path in tmp_path.iterdir()] == ["shm"]


def test_the_engine_s_arguments_are_kept_where_its_shared_memory_is_looked_for() -> None:
    with DoomWorld(WorldSettings()) as doom:
        words = (Path(doom._folder.name) / "arguments").read_text().split()
        instance = words[words.index("+viz_instance_id") + 1]
        assert list(Path("/dev/shm").glob(f"ViZDoom*{instance}"))
    assert not list(Path("/dev/shm").glob(f"ViZDoom*{instance}"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as the dynamic linker of Linux tells it")
def test_libraries_that_the_engine_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_libraries(ENGINE) == []
    told = "\tlibSDL2-2.0.so.0 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n"
    monkeypatch.setattr(doom_module.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    with pytest.raises(EngineError, match=r"needs libSDL2-2\.0\.so\.0: install"):
        DoomWorld(WorldSettings())


def test_folders_of_killed_worlds_are_removed_and_no_others(tmp_path: Path) -> None:
    left, used, begun = (tmp_path / f"{FOLDER_PREFIX}{name}" for name in ("left", "used", "begun"))
    for folder in (left, used, begun, tmp_path / "else"):
        folder.mkdir()
        (folder / "engine").write_text("")
    with lock_folder(used, "world"):
        remove_abandoned_folders(tmp_path, time.time())
        assert left.exists(), "it may have just begun"
        os.utime(begun, (time.time() + 3600, time.time() + 3600))
        remove_abandoned_folders(tmp_path, time.time() + 2 * ABANDONED_AFTER_S)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ami-world-begun", "ami-world-used", "else"]
