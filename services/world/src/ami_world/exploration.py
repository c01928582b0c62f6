"""How much of the map's floor the avatar has visited. Pure geometry on a grid of square cells.

Reachable floor: sample points 8 units apart that are in a sector with headroom, at least an avatar's radius from
every wall, and connected to the start. A cell counts if a quarter of its points or more are reachable.
Stairs, lifts and doors are not considered: a step that is too high does not separate two floors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SAMPLE_SPACING = 8.0
AVATAR_RADIUS = 16.0
HEADROOM = 56.0
LEAST_REACHABLE_PART = 0.25

Cell = tuple[int, int]
Point = tuple[float, float]
Axis = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Edge:
    """One side of a sector, in map units."""

    x1: float
    y1: float
    x2: float
    y2: float
    blocking: bool


@dataclass(frozen=True)
class Sector:
    """A piece of floor with one height, bounded by its edges."""

    floor: float
    ceiling: float
    edges: tuple[Edge, ...]


class Exploration:
    """The cells of the reachable floor, and which of them were visited."""

    def __init__(self, cell_size: float, reachable: Iterable[Cell]) -> None:
        self._cell_size = cell_size
        self.reachable = frozenset(reachable)
        self._visited: set[Cell] = set()

    def visit(self, x: float, y: float) -> None:
        cell = cell_of(x, y, self._cell_size)
        if cell in self.reachable:
            self._visited.add(cell)

    @property
    def visited(self) -> int:
        return len(self._visited)

    @property
    def share(self) -> float:
        return self.visited / len(self.reachable) if self.reachable else 0.0


def cell_of(x: float, y: float, cell_size: float) -> Cell:
    """Return the cell, (column, row), that contains a point; all in map units."""
    return int(x // cell_size), int(y // cell_size)


def reachable_cells(sectors: Sequence[Sector], start: Point, cell_size: float) -> frozenset[Cell]:
    """Return the cells of the floor that the avatar can walk to from `start`."""
    edges = [edge for sector in sectors for edge in sector.edges]
    if not edges:
        return frozenset()
    xs = _samples([x for edge in edges for x in (edge.x1, edge.x2)])
    ys = _samples([y for edge in edges for y in (edge.y1, edge.y2)])
    free = np.zeros((len(ys), len(xs)), dtype=bool)
    for sector in sectors:
        if sector.ceiling - sector.floor >= HEADROOM:
            free |= _inside(sector, xs, ys)
    for edge in edges:
        if edge.blocking:
            _clear_beside(edge, xs, ys, free)
    return _cells(_connected(free, xs, ys, start), xs, ys, cell_size)


def _samples(coordinates: Sequence[float]) -> Axis:
    return np.arange(min(coordinates) + SAMPLE_SPACING / 2, max(coordinates), SAMPLE_SPACING)


def _inside(sector: Sector, xs: Axis, ys: Axis) -> Mask:
    """Mark the points from which a ray to the right crosses the sector's edges an odd number of times."""
    odd = np.zeros((len(ys), len(xs)), dtype=bool)
    for edge in sector.edges:
        rows = np.flatnonzero((ys < edge.y1) != (ys < edge.y2))
        if len(rows):
            crossing = edge.x1 + (ys[rows] - edge.y1) / (edge.y2 - edge.y1) * (edge.x2 - edge.x1)
            odd[rows] ^= xs[None, :] < crossing[:, None]
    return odd


def _clear_beside(edge: Edge, xs: Axis, ys: Axis, free: Mask) -> None:
    """Unmark the points that are closer to a wall than the avatar's radius."""
    columns = _span(xs, edge.x1, edge.x2)
    rows = _span(ys, edge.y1, edge.y2)
    dx, dy = edge.x2 - edge.x1, edge.y2 - edge.y1
    x, y = xs[None, columns] - edge.x1, ys[rows, None] - edge.y1
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-9), 0.0, 1.0)
    free[rows, columns] &= np.hypot(x - along * dx, y - along * dy) >= AVATAR_RADIUS


def _span(samples: Axis, a: float, b: float) -> slice:
    low, high = min(a, b) - AVATAR_RADIUS, max(a, b) + AVATAR_RADIUS
    return slice(int(np.searchsorted(samples, low)), int(np.searchsorted(samples, high, "right")))


def _connected(free: Mask, xs: Axis, ys: Axis, start: Point) -> Mask:
    """Return the points of the connected floor that contains the free point nearest to `start`."""
    rows, columns = np.nonzero(free)
    if not len(rows):
        return free
    nearest = int(np.argmin(np.hypot(xs[columns] - start[0], ys[rows] - start[1])))
    _, pieces = cv2.connectedComponents(free.astype(np.uint8), connectivity=4)
    connected: Mask = pieces == pieces[rows[nearest], columns[nearest]]
    return connected


def _cells(points: Mask, xs: Axis, ys: Axis, cell_size: float) -> frozenset[Cell]:
    rows, columns = np.nonzero(points)
    pairs = np.stack([xs[columns] // cell_size, ys[rows] // cell_size], axis=1).astype(int)
    cells, counts = np.unique(pairs, axis=0, return_counts=True)
    least = LEAST_REACHABLE_PART * (cell_size / SAMPLE_SPACING) ** 2
    return frozenset((int(x), int(y)) for (x, y), count in zip(cells, counts, strict=True) if count >= least)
