from __future__ import annotations

from typing import Any

import pytest

from ami_shared.errors import ConfigurationError
from ami_world.doom import find_scenario
from ami_world.settings import WorldSettings, settings_from

pytestmark = pytest.mark.filterwarnings("error")


def test_an_empty_section_means_the_defaults() -> None:
    assert settings_from({}) == WorldSettings()


def test_whole_numbers_do_for_fractions() -> None:
    assert settings_from({"turn_speed": 90}).gait.turn_speed == 90.0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"htp_port": 1}, r"world\.htp_port is not a key"),
        ({"http_port": "80"}, r"world\.http_port='80' has the wrong type"),
        ({"http_port": True}, r"world\.http_port=True has the wrong type"),
        ({"http_port": None}, r"world\.http_port=None has the wrong type"),
        ({"http_port": 70000}, r"world\.http_port=70000 is out of range"),
        ({"frame_rate": 36}, r"world\.frame_rate=36\.0 is out of range"),
        ({"jpeg_quality": 0}, r"world\.jpeg_quality=0 is out of range"),
        ({"look_deadzone": float("nan")}, r"world\.look_deadzone=nan is out of range"),
        ({"width": 321}, r"world\.width=321"),
        (None, r"add \+world=vizdoom"),
    ],
)
def test_what_is_wrong_is_named(section: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        settings_from(section)


def test_a_missing_scenario_is_named_along_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"'nowhere' was not found: .*basic.*my_way_home"):
        find_scenario("nowhere")


def test_scenarios_are_found_by_name_and_by_path() -> None:
    packaged = find_scenario("my_way_home")
    assert packaged.name == "my_way_home.cfg"
    assert find_scenario(str(packaged)) == packaged
    assert find_scenario(str(packaged.with_suffix(".wad"))) == packaged.with_suffix(".wad")
