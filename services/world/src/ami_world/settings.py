"""The section `world` of the configuration as one frozen value. Meaning and units: configs/world/*.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import vizdoom

from ami_shared.errors import ConfigurationError
from ami_world.inputs import Gait

TIC_RATE = 35  # a second; built into Doom
FASTEST = 583.0  # map units a second; Doom clips higher speeds
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "osc_port": (0, 65535),
    "http_port": (0, 65535),
    "client_limit": (1, 1000),
    "frame_rate": (1, TIC_RATE),
    "jpeg_quality": (1, 100),
    "walk_speed": (1, FASTEST),
    "run_factor": (1, 10),
    "turn_speed": (1, 720),
    "look_deadzone": (0, 1),
    "cell_size": (16, 1024),
}


@dataclass(frozen=True)
class WorldSettings:
    """The section `world`; configs/world/vizdoom.yaml explains each key.

    Attributes:
        scenario: name of a packaged scenario, or path of a .cfg or .wad file.
        seed: of the game.
        osc_host: address at which OSC is received.
        osc_port: UDP port there.
        http_host: address of camera and page.
        http_port: TCP port there.
        client_limit: largest number of simultaneous viewers of the stream.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        frame_rate: frames per second, at most one per tic.
        jpeg_quality: of the frames, see RANGES.
        walk_speed: map units per second.
        run_factor: running speed as a multiple of walk_speed.
        turn_speed: degrees per second.
        look_deadzone: magnitudes of LookHorizontal up to this have no effect.
        cell_size: side of the cells in which explored floor is counted, in map units.

    Raises:
        ConfigurationError: a value is out of range.
    """

    scenario: str = "my_way_home"
    seed: int = 0
    osc_host: str = "127.0.0.1"
    osc_port: int = 9000
    http_host: str = "127.0.0.1"
    http_port: int = 8080
    client_limit: int = 16
    width: int = 320
    height: int = 240
    frame_rate: float = 30.0
    jpeg_quality: int = 85
    walk_speed: float = 290.0
    run_factor: float = 2.0
    turn_speed: float = 120.0
    look_deadzone: float = 0.5
    cell_size: float = 32.0

    def __post_init__(self) -> None:
        for key, (low, high) in RANGES.items():
            value = getattr(self, key)
            if not low <= value <= high:
                raise ConfigurationError(f"world.{key}={value} is out of range: set it from {low} to {high}")
        if self.resolution not in vizdoom.ScreenResolution.__members__:
            raise ConfigurationError(
                f"world.width={self.width} with world.height={self.height} is not a size that VizDoom renders: "
                "set e.g. 160x120, 320x240, 640x480 or 640x360"
            )

    @property
    def resolution(self) -> str:
        """The size's name in VizDoom."""
        return f"RES_{self.width}X{self.height}"

    @property
    def gait(self) -> Gait:
        return Gait(self.walk_speed, self.run_factor, self.turn_speed, self.look_deadzone)


def settings_from(section: Mapping[str, Any] | None) -> WorldSettings:
    """Check the section `world` and return it as a value.

    Raises:
        ConfigurationError: there is no section, a key is unknown, or a value has the wrong type or is out of range.
    """
    if section is None:
        raise ConfigurationError(
            "world: this experiment has no simulated world: choose one that has one, or add +world=vizdoom"
        )
    types = {field.name: type(field.default) for field in fields(WorldSettings)}
    for key in section:
        if key not in types:
            raise ConfigurationError(f"world.{key} is not a key of the section world, which takes {', '.join(types)}")
    return WorldSettings(**{str(key): _typed(key, value, types[key]) for key, value in section.items()})


def _typed(key: str, value: Any, kind: type) -> Any:
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ConfigurationError(f"world.{key}={value!r} has the wrong type: it takes {kind.__name__}")
    return kind(value)
