"""What the world reports on /state: measurements for people and tests, not input for agents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ami_world.inputs import HeldInputs
from ami_world.osc import OscCounters


@dataclass(frozen=True)
class Position:
    """In map units; z is the height of the feet."""

    x: float = 0.0
    y: float = 0.0
    z: float = 0.0


@dataclass(frozen=True)
class GameStatus:
    """The game's state after the newest tic."""

    position: Position = field(default_factory=Position)
    angle_deg: float = 0.0
    inputs: HeldInputs = field(default_factory=HeldInputs)
    explored_share: float = 0.0
    explored_cells: int = 0
    reachable_cells: int = 0
    tics: int = 0
    episodes: int = 0
    late_tics: int = 0  # grid points that were skipped
    tic_rate_hz: float = 0.0


@dataclass(frozen=True)
class CameraStatus:
    """The video server's counters; `clients` is the number of present viewers of the stream."""

    frames_served: int = 0
    clients: int = 0


def report(game: GameStatus, camera: CameraStatus, osc: OscCounters, uptime_s: float) -> dict[str, Any]:
    """Return everything as one map for JSON."""
    inputs = asdict(game.inputs)
    del inputs["jump_wanted"]
    return {
        **asdict(game),
        "inputs": inputs,
        **asdict(camera),
        "osc": asdict(osc),
        "uptime_s": round(uptime_s, 3),
    }
