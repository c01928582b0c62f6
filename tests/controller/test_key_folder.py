"""The controller's folder of keys."""

from __future__ import annotations

import argparse
import re
import stat
from pathlib import Path

import pytest

from ami_controller.cli.keys import show_list
from ami_controller.key_folder import KeyFolder
from ami_shared.bus import HubAddress
from ami_shared.errors import ConfigurationError
from ami_shared.keys import HAS_MODES, KeyFile

HUB = HubAddress("10.0.0.1", 5550)


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    made = KeyFolder(tmp_path / "keys")
    assert made.init(HUB)
    return made


def test_the_hub_s_pair_is_made_once(folder: KeyFolder) -> None:
    before = folder.pair()
    assert not folder.init(HubAddress("other", 1))
    assert folder.pair() == before
    assert folder.hub() == str(HUB)


def test_a_service_s_file_fits_the_hub_and_the_list(folder: KeyFolder, tmp_path: Path) -> None:
    folder.add("body", "body", tmp_path / "there" / "body.json")
    folder.add("ppo", "trainer", tmp_path / "ppo.json", hub="127.0.0.1:7000")
    body, ppo = KeyFile.load(tmp_path / "there" / "body.json"), KeyFile.load(tmp_path / "ppo.json")
    assert body.credentials.hub_public == folder.pair().public
    assert (body.hub, ppo.hub) == (str(HUB), "127.0.0.1:7000")
    listed = {peer.name: (peer.role, peer.public) for peer in folder.allowed().peers}
    assert listed == {"body": ("body", body.credentials.pair.public), "ppo": ("trainer", ppo.credentials.pair.public)}


@pytest.mark.parametrize(
    ("name", "role", "told"),
    [
        ("body", "body", "has a key already"),
        ("../x", "body", "cannot be a service's name"),
        ("controller", "body", "cannot be a service's name"),
        ("", "body", "cannot be a service's name"),
        ("x", "king", "--role king"),
    ],
)
def test_what_cannot_be_added_is_one_line(folder: KeyFolder, tmp_path: Path, name: str, role: str, told: str) -> None:
    folder.add("body", "body", tmp_path / "body.json")
    with pytest.raises(ConfigurationError, match=told):
        folder.add(name, role, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_no_key_file_is_overwritten(folder: KeyFolder, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text("somebody's")
    with pytest.raises(ConfigurationError, match="exists"):
        folder.add("body", "body", tmp_path / "body.json")
    assert not folder.allowed().peers


def test_a_revoked_service_may_have_another_key(folder: KeyFolder, tmp_path: Path) -> None:
    folder.add("body", "body", tmp_path / "1.json")
    first = folder.allowed().peers
    seen = folder.changes()
    folder.revoke("body")
    assert folder.changes() != seen
    assert folder.allowed().peers == []
    assert folder.revoked().peers == first
    with pytest.raises(ConfigurationError, match="has no key"):
        folder.revoke("body")
    folder.add("body", "body", tmp_path / "2.json")
    assert folder.allowed().peers[0].public != first[0].public


def test_a_local_key_is_made_once(folder: KeyFolder) -> None:
    path = folder.local("body", "body")
    before = path.read_text()
    assert folder.local("body", "body") == path
    assert path.read_text() == before


def test_a_file_that_is_no_entry_is_named_and_the_others_hold(folder: KeyFolder, tmp_path: Path) -> None:
    folder.add("body", "body", tmp_path / "body.json")
    folder.add("ppo", "trainer", tmp_path / "ppo.json")
    entry = folder.folder / "allowed" / "body.json"
    whole = entry.read_text()
    for broken in ("", "[]", whole.replace('"body"', '"other"', 1), whole.replace('"role": "body"', '"role": "king"')):
        entry.write_text(broken)
        listing = folder.allowed()
        assert [peer.name for peer in listing.peers] == ["ppo"]
        assert f"{entry} is not an entry" in listing.odd["body"]
    with pytest.raises(ConfigurationError, match="not an entry"):
        show_list(folder, argparse.Namespace())


def test_a_list_whose_folder_a_copy_has_lost_is_made_again(folder: KeyFolder, tmp_path: Path) -> None:
    (folder.folder / "allowed").rmdir()
    folder.add("body", "body", tmp_path / "body.json")
    assert [peer.name for peer in folder.allowed().peers] == ["body"]


def test_a_key_that_cannot_be_put_on_the_list_leaves_no_file(folder: KeyFolder, tmp_path: Path) -> None:
    (folder.folder / "allowed").rmdir()
    (folder.folder / "allowed").write_text("a file")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        folder.add("body", "body", tmp_path / "body.json")
    assert not (tmp_path / "body.json").exists()


def test_a_folder_without_keys_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ami keys init --dir"):
        KeyFolder(tmp_path).pair()


@pytest.mark.skipif(not HAS_MODES, reason="no file modes here")
def test_the_hub_s_secret_is_open_to_nobody_else(folder: KeyFolder) -> None:
    path = folder.folder / "hub.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        folder.pair()


def test_a_key_is_revoked_also_where_a_copy_has_lost_the_empty_folder(folder: KeyFolder, tmp_path: Path) -> None:
    folder.add("body", "body", tmp_path / "body.json")
    (folder.folder / "revoked").rmdir()
    folder.revoke("body")
    assert [peer.name for peer in folder.revoked().peers] == ["body"]
    assert folder.allowed().peers == []


def test_a_revocation_that_fails_says_so_and_that_the_key_is_still_good(folder: KeyFolder, tmp_path: Path) -> None:
    folder.add("body", "body", tmp_path / "body.json")
    (folder.folder / "revoked").rmdir()
    (folder.folder / "revoked").write_text("a file")
    with pytest.raises(ConfigurationError, match="body is NOT revoked"):
        folder.revoke("body")
    assert [peer.name for peer in folder.allowed().peers] == ["body"]


def test_a_key_of_this_machine_that_came_onto_no_list_is_put_there(folder: KeyFolder) -> None:
    path = folder.local("body", "body")
    (folder.folder / "allowed" / "body.json").unlink()  # as if killed between the two files
    assert folder.local("body", "body") == path
    (peer,) = folder.allowed().peers
    assert (peer.name, peer.role, peer.public) == ("body", "body", KeyFile.load(path).credentials.pair.public)


def test_a_key_of_this_machine_that_is_not_let_in_is_not_used(folder: KeyFolder, tmp_path: Path) -> None:
    path = folder.local("body", "body")
    folder.revoke("body")
    with pytest.raises(ConfigurationError, match=re.escape(f"was revoked: remove {path}")):
        folder.local("body", "body")
    folder.add("body", "body", tmp_path / "body.key.json")
    with pytest.raises(ConfigurationError, match=re.escape(f"{path} is not the key that body has now")):
        folder.local("body", "body")
    (tmp_path / "body.key.json").replace(path)
    assert folder.local("body", "body") == path
    first = path.read_bytes()
    folder.revoke("body")
    path.unlink()
    folder.local("body", "body")
    folder.revoke("body")
    path.write_bytes(first)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="was revoked"):  # though the list has but the last key of a name
        folder.local("body", "body")
