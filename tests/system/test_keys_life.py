"""A system whose hub has keys, as its user sees it: real processes, key files, and who is turned away."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from processes import Process, System, free_base_port, one_error_line, poll_for

from ami_shared.keys import KeyFile

MakeSystem = Callable[..., System]
Tunnels = Callable[[int], int]


def ami(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ami_controller.cli.main", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def tunnels() -> Iterator[Tunnels]:
    """Return a function that forwards five ports to those of a hub, and returns the first of them."""
    made = []

    def forward(port: int) -> int:
        begin = free_base_port()
        made.append(FaultProxy(range(begin, begin + 5), range(port, port + 5)))
        return begin

    yield forward
    for tunnel in made:
        tunnel.close()


def test_a_life_with_keys_and_the_end_of_one(make_system: MakeSystem, tunnels: Tunnels) -> None:
    system = make_system("experiment=noise")
    system.use_keys(eye="observer")
    system.start("controller")
    poll_for(lambda: system.ami("status").returncode == 0, 30, "the controller has its ports")
    forwarded = tunnels(system.hub.port)  # the body reaches the hub as through SSH: by ports of its own machine
    trainer = system.start("image_vae")
    body = system.start("body", f"hub=127.0.0.1:{forwarded}")
    system.wait_running()

    def operator(*words: str, who: str = "me") -> subprocess.CompletedProcess[str]:
        return ami(system.folder, *words, "--join", f"{who}.key.json")

    for word in ("pause", "resume"):
        system.command(word)
        refused = operator(word, who="eye")
        assert refused.returncode == 1
        assert f"observer eye may not say '{word}'" in one_error_line(refused.stderr)
    assert "running" in operator("status", who="eye").stdout
    assert ami(system.folder, "status", "--join", "body.key.json").returncode == 2

    def told_why() -> subprocess.CompletedProcess[str] | None:
        """What is said without a key; a busy hub may not have broken off often enough before the command gives up."""
        without = ami(system.folder, "status", "--hub", str(system.hub))
        return without if "--join" in one_error_line(without.stderr) else None

    assert poll_for(told_why, what="the advice to give a key").returncode in (2, 3)
    assert "refused" in operator("status").stdout

    assert ami(system.folder, "keys", "revoke", "image_vae").returncode == 0
    assert trainer.exit_code() == 5, "as one whose key was revoked"
    assert "revoked" in one_error_line(trainer.output)
    again = system.start("image_vae")
    assert again.exit_code() == 2
    assert "does not know this key" in one_error_line(again.output)
    published = system.status()["experience"][0]["published"]
    poll_for(lambda: system.status()["experience"][0]["published"] > published + 10, what="the body goes on")
    assert "revoked" in ami(system.folder, "keys", "list").stdout

    (system.folder / "image_vae.key.json").unlink()
    assert ami(system.folder, "keys", "add", "image_vae", "--role", "trainer").returncode == 0
    system.start("image_vae")
    poll_for(lambda: system.service("image_vae")["state"] == "running", what="a new key lets it in")
    assert body.popen.poll() is None
    secrets = [KeyFile.load(path).credentials.pair.secret.decode() for path in system.folder.glob("*.key.json")]
    everything = [*(process.output for process in system.processes)]
    everything += [path.read_text(errors="replace") for path in system.run_dir.rglob("*.*") if path.is_file()]
    assert len(secrets) == 4
    assert not [secret for secret in secrets if any(secret in text for text in everything)]


def test_up_makes_the_keys_of_its_own_services(make_system: MakeSystem) -> None:
    system = make_system("experiment=noise", "controller.key_folder=keys")
    assert ami(system.folder, "keys", "init", "--hub", str(system.hub)).returncode == 0
    up = system.start("up")
    key = system.folder / "keys" / "local" / "local-operator.key.json"
    poll_for(key.exists, what="the operator's key")
    system.hub = system.hub.with_credentials(KeyFile.load(key).credentials)
    assert system.wait_running()["hub"]["security"] == "keys"
    assert ami(system.folder, "shutdown", "--join", str(key)).returncode == 0
    assert up.exit_code() == 0, up.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--join"], "path of a key file"),
        (["--join", "nowhere.json"], "cannot be read"),
        (["--join", "me.key.json"], "for the role operator, but this is a body"),
        (["--join", "body.key.json", "inference.name=other"], "belongs to body body, but this is body other"),
        (["--join", "open.key.json"], "chmod 600"),
        (["--join", "torn.key.json"], "not a file of `ami keys add`"),
        (["join=nowhere.json"], "cannot be read"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_one_line(make_system: MakeSystem, words: list[str], told: str) -> None:
    system = make_system("experiment=noise")
    system.use_keys()
    whole = (system.folder / "body.key.json").read_text()
    for name, mode, text in (("open", 0o644, whole), ("torn", 0o600, whole[:60])):
        path = system.folder / f"{name}.key.json"
        path.write_text(text)
        path.chmod(mode)
    command = [sys.executable, "-m", "ami_inference.main", "experiment=noise", *words]
    body = Process("body", command, system.folder / "body.log", cwd=system.folder)
    assert body.exit_code() == 2
    body.close()
    assert told in one_error_line(body.output)


def test_a_folder_without_keys_is_one_line(make_system: MakeSystem) -> None:
    controller = make_system("experiment=noise").start("controller", "controller.key_folder=nothing")
    assert controller.exit_code() == 2
    assert "ami keys init --dir nothing" in one_error_line(controller.output)
