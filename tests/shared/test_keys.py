"""Key files: secrets that stay secret, and what is wrong with a file in one line."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from ami_shared import keys
from ami_shared.errors import ConfigurationError
from ami_shared.keys import Credentials, KeyFile, Pair

POSIX = pytest.mark.skipif(not keys.HAS_MODES, reason="no file modes here")


@pytest.fixture
def key() -> KeyFile:
    return KeyFile("body", "body", "10.0.0.1:5550", Credentials(Pair.new().public, Pair.new()))


def test_what_is_written_is_read_back(key: KeyFile, tmp_path: Path) -> None:
    key.write(tmp_path / "body.json")
    assert KeyFile.load(tmp_path / "body.json") == key


@POSIX
def test_nobody_else_can_read_it_at_any_time(key: KeyFile, tmp_path: Path) -> None:
    (tmp_path / "body.json.tmp").write_text("left by a crash, and open to all")
    key.write(tmp_path / "body.json")
    assert stat.S_IMODE((tmp_path / "body.json").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["body.json"]


@POSIX
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o777])
def test_one_that_others_can_read_is_refused(key: KeyFile, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "body.json"
    key.write(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        KeyFile.load(path)


def test_where_files_have_no_modes_none_are_asked_for(
    key: KeyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "body.json"
    key.write(path)
    path.chmod(0o644)
    monkeypatch.setattr(keys, "HAS_MODES", False)
    assert KeyFile.load(path) == key


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"role": "king"}, "lacks the name and role"),
        ({"name": "a/b"}, "lacks the name and role"),
        ({"secret": "short"}, "Z85"),
        ({"hub_public": "~" * 40}, "Z85"),
        ({"public": "é" * 40}, "Z85"),
        ({"public": "$" * 40}, "Z85"),
        ({"public": 5}, "not a file of"),
        ({"hub": None}, "not a file of"),
    ],
)
def test_a_broken_one_is_one_line_without_its_secret(
    key: KeyFile, tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    path = tmp_path / "body.json"
    key.write(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changed))
    with pytest.raises(ConfigurationError, match=told) as error:
        KeyFile.load(path)
    assert content["secret"] not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '"body"'])
def test_what_is_no_key_file_is_told_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "body.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="not a file of `ami keys add`"):
        KeyFile.load(path)


def test_a_missing_one_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        KeyFile.load(tmp_path / "body.json")


def test_secrets_are_not_shown(key: KeyFile) -> None:
    assert key.credentials.pair.secret.decode() not in repr(key)
