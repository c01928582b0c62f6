from __future__ import annotations

import pytest

from ami_world.exploration import Edge, Exploration, Sector, cell_of, reachable_cells

pytestmark = pytest.mark.filterwarnings("error")

SIDES = ("south", "east", "north", "west")


def room(x: float, y: float, width: float, height: float, doors: str = "", ceiling: float = 128.0) -> Sector:
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    walls = zip(SIDES, corners, corners[1:] + corners[:1], strict=True)
    return Sector(0.0, ceiling, tuple(Edge(*a, *b, blocking=side not in doors) for side, a, b in walls))


def test_every_cell_of_a_room_is_reachable() -> None:
    cells = reachable_cells([room(0, 0, 256, 128)], start=(128, 64), cell_size=32)
    assert cells == {(x, y) for x in range(8) for y in range(4)}


def test_cells_left_and_below_of_the_origin_are_counted_alike() -> None:
    cells = reachable_cells([room(-128, -128, 128, 128)], start=(-64, -64), cell_size=32)
    assert cells == {(x, y) for x in range(-4, 0) for y in range(-4, 0)}


def test_a_room_behind_an_open_side_is_reachable() -> None:
    rooms = [room(0, 0, 128, 128, doors="east"), room(128, 0, 128, 128, doors="west")]
    assert len(reachable_cells(rooms, start=(64, 64), cell_size=32)) == 32


def test_a_room_behind_a_wall_is_not_reachable() -> None:
    rooms = [room(0, 0, 128, 128), room(128, 0, 128, 128)]
    cells = reachable_cells(rooms, start=(200, 64), cell_size=32)
    assert cells == {(x, y) for x in range(4, 8) for y in range(4)}


def test_a_passage_narrower_than_the_avatar_is_not_reachable() -> None:
    rooms = [room(0, 0, 128, 128, doors="east"), room(128, 50, 128, 28, doors="west")]
    assert max(x for x, _ in reachable_cells(rooms, start=(64, 64), cell_size=32)) < 5


def test_a_sector_without_headroom_is_not_reachable() -> None:
    rooms = [room(0, 0, 128, 128, doors="east"), room(128, 0, 128, 128, doors="west", ceiling=40)]
    assert len(reachable_cells(rooms, start=(64, 64), cell_size=32)) == 16


def test_a_map_without_sectors_has_no_floor() -> None:
    exploration = Exploration(32, reachable_cells([], start=(0, 0), cell_size=32))
    exploration.visit(1, 1)
    assert exploration.share == 0.0


def test_the_share_counts_each_cell_once() -> None:
    exploration = Exploration(32, {(0, 0), (1, 0), (2, 0), (3, 0)})
    for x in (1, 2, 31, 33):
        exploration.visit(x, 5)
    assert (exploration.visited, exploration.share) == (2, 0.5)


def test_places_off_the_floor_count_for_nothing() -> None:
    exploration = Exploration(32, {(0, 0)})
    exploration.visit(-1, 0)
    assert exploration.visited == 0


def test_cells_are_half_open() -> None:
    assert [cell_of(x, 0, 32) for x in (-0.1, 0, 31.9, 32)] == [(-1, 0), (0, 0), (0, 0), (1, 0)]
