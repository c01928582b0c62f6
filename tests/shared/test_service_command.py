"""Short words of the services' command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from ami_shared.errors import ConfigurationError
from ami_shared.keys import Credentials, KeyFile, Pair
from ami_shared.service_command import spelt_out


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "ppo.json"
    KeyFile("ppo", "trainer", "10.0.0.1:5550", Credentials(Pair.new().public, Pair.new())).write(path)
    return path


def test_a_key_file_tells_name_and_hub_and_later_words_count(key: Path) -> None:
    words = spelt_out("trainer", ["seed=3", "--join", str(key), "hub=other:1"])
    assert words == [f'join="{key}"', "hub=10.0.0.1:5550", "trainer=ppo", "seed=3", "hub=other:1"]


@pytest.mark.parametrize("role", ["trainer", "body"])
def test_a_key_file_may_be_named_from_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.chdir(tmp_path)
    KeyFile("ppo", role, "10.0.0.1:5550", Credentials(Pair.new().public, Pair.new())).write(Path("ppo.key.json"))
    words = spelt_out(role, ["--join", "ppo.key.json", "seed=3"])
    assert words[0] == f'join="{tmp_path.resolve()}/ppo.key.json"'
    assert words[-1] == "seed=3"


def test_a_trainer_s_name_may_stand_alone(key: Path) -> None:
    assert spelt_out("trainer", ["ppo", "seed=3"]) == ["trainer=ppo", "seed=3"]
    assert "trainer=ppo" in spelt_out("trainer", ["ppo", "--join", str(key)])
    assert spelt_out("body", ["ppo"]) == ["ppo"]


@pytest.mark.parametrize(
    ("role", "word", "override"),
    [
        ("controller", "--insecure", "controller.insecure=true"),
        ("body", "--take-over", "take_over=true"),
        ("trainer", "--take-over", "take_over=true"),
        ("body", "--insecure", "--insecure"),
    ],
)
def test_short_words(role: str, word: str, override: str) -> None:
    assert spelt_out(role, [word]) == [override]


def test_a_key_file_of_another_role_is_refused(key: Path) -> None:
    with pytest.raises(ConfigurationError, match="for the role trainer, but this is a body"):
        spelt_out("body", ["--join", str(key)])


def test_the_environment_may_name_the_key_file(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_JOIN", str(key))
    monkeypatch.delenv("AMI_HUB", raising=False)
    assert spelt_out("trainer", ["seed=3"]) == [f'join="{key}"', "hub=10.0.0.1:5550", "trainer=ppo", "seed=3"]
    assert spelt_out("trainer", ["join=other.json"]) == ["join=other.json"], "what is said in words counts"
    assert spelt_out("controller", []) == [], "which has no key file"
    monkeypatch.setenv("AMI_HUB", "here:7000")
    assert spelt_out("trainer", []) == [f'join="{key}"', "trainer=ppo"], "a hub that the environment names, too, counts"
    with pytest.raises(ConfigurationError, match="for the role trainer, but this is a body"):
        spelt_out("body", [])
