"""What `ami doctor` finds."""

from __future__ import annotations

import base64
import io
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import ami_controller.cli.doctor as doctoring
from ami_controller.cli.doctor import can_bind, doctor
from ami_controller.cli.main import main
from ami_shared.bus import HubAddress
from ami_shared.keys import Credentials, KeyFile, Pair


@pytest.fixture
def words(hub: HubAddress, tmp_path: Path) -> list[str]:
    return [f"hub={hub}", f"run_dir={tmp_path}/run", "experiment=noise"]


def found(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Return the exit code, and what is bad."""
    code = doctor(words)
    lines = capsys.readouterr().out.splitlines()
    return code, [line.strip().removeprefix("✗ ") for line in lines if "✗" in line]


def test_a_path_is_shown_as_it_is(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor([*words, f"run_dir={tmp_path}/[/y][red]"])
    assert f"{tmp_path}/[/y][red]" in capsys.readouterr().out


def test_a_device_that_is_not_here_may_be_elsewhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor([*words, "trainers.image_vae.device=abacus"]) == 0
    told = capsys.readouterr().out
    assert "trainers.image_vae.device='abacus' cannot be used here" in told
    assert "fine if that service runs elsewhere" in told


def test_videos_that_are_not_there_are_missed(hub: HubAddress, capsys: pytest.CaptureFixture[str]) -> None:
    code, bad = found([f"hub={hub}", "experiment=video", "inference.environment.sensor.path=no/where"], capsys)
    assert code == 1
    assert "no/where does not exist" in bad[0]


@pytest.mark.parametrize("there", [True, False])
def test_who_has_chosen_no_camera_is_told_which_there_are(
    hub: HubAddress, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    probed = {2: ("ok", "camera 2 delivers 720x720 pixels")} if there else {}
    monkeypatch.setattr(doctoring, "probe_camera", lambda index: probed.get(index, ("bad", "nothing")))
    assert doctor([f"hub={hub}", "experiment=vrchat"]) == 1
    told = capsys.readouterr().out
    assert "no camera is chosen: " + ("set" if there else "start OBS's virtual camera, then set") in told
    assert ("there is: camera 2 delivers 720x720 pixels" in told) == there


def test_a_machine_on_which_it_can_run_is_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert found(words, capsys) == (0, [])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("hub=192.0.2.7:5550", "no controller answers at 192.0.2.7:5550, another machine or none"),
        ("controller.bind=nonsense", "controller.bind=nonsense is not an address of this machine"),
        ("run_dir={file}/x", "cannot be written to"),
        ("controller.bind=0.0.0.0", "controller.bind=0.0.0.0 listens beyond this machine without keys"),
        ("controller.key_folder={file}-not-there", "file-not-there"),
    ],
)
def test_what_cannot_work_is_bad(
    words: list[str], word: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code, bad = found([*words, word.format(file=tmp_path / "file")], capsys)
    assert (code, len(bad)) == (1, 1)
    assert told in bad[0]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("world.http_port=abc", "world.http_port='abc' has the wrong type"),
        ("world.http_port=99999", "world.http_port=99999 is out of range"),
        ("inference.environment.actuator.port=99999", "actuator.port=99999 must be a whole number, 1 to 65535"),
        ("inference.environment.actuator.port=abc", "actuator.port='abc' must be a whole number"),
        ("inference.environment.actuator.host=nowhere.invalid", "cannot be resolved"),
    ],
)
def test_what_the_simulated_world_cannot_work_with_is_bad(
    hub: HubAddress, word: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, bad = found([f"hub={hub}", f"run_dir={tmp_path}/run", word], capsys)
    assert code == 1
    assert any(told in line for line in bad), bad


def test_a_taken_port_is_bad(words: list[str], hub: HubAddress, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", hub.port + 2))
        holder.listen()
        assert not can_bind("127.0.0.1", hub.port + 2, socket.SOCK_STREAM)
        code, bad = found(words, capsys)
    assert (code, len(bad)) == (1, 1)
    assert f"port {hub.port + 2} is taken" in bad[0]


@pytest.mark.parametrize("place", ["127.0.0.1:9", "127.0.0.1", "127.0.0.1:port", "[127.0.0.1:9"])
def test_a_password_is_shown_to_nobody(place: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, bad = found([*words, f"tracker.uri='http://me:secret@{place}'"], capsys)
    assert (code, len(bad)) == (1, 1)
    assert f"http://me:***@{place}" in bad[0]
    assert "secret" not in bad[0]


class Locked(BaseHTTPRequestHandler):
    """A server that lets in nobody but me."""

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Basic " + base64.b64encode(b"me:se/cret").decode()
        self.send_response(200 if known and self.path == "/mlflow/health" else 401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.parametrize(("account", "code"), [("me:se%2Fcret@", 0), ("me:guess@", 1), ("", 1)])
def test_a_server_with_a_password_is_asked_with_it(
    account: str, code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with HTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever).start()
        uri = f"tracker.uri='http://{account}127.0.0.1:{server.server_port}/mlflow'"
        assert found([*words, uri], capsys)[0] == code
        server.shutdown()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("raise OSError('[WinError 1114] A dynamic link library (DLL) initialization routine failed')", "vc_redist"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_a_library_that_is_installed_but_cannot_be_loaded_is_bad(
    script: str,
    told: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "torch.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, bad = found(words, capsys)
    assert code == 1
    assert "torch cannot be loaded" in bad[0]
    assert told in bad[0]


def test_what_speaks_no_http_is_bad_and_no_defect(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def greet() -> None:
        caller, _ = other.accept()
        caller.sendall(b"220 mail.example.org\r\n")
        caller.close()

    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=greet).start()
        code, bad = found([*words, f"tracker.uri=http://127.0.0.1:{other.getsockname()[1]}"], capsys)
    assert code == 1
    assert "speaks no HTTP" in bad[0]


def test_a_file_that_takes_no_marks_gets_the_rest(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Windows, where the output goes into a file."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["ami", "doctor", *words])
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    main()
    assert ended == [0]
    assert b"all is well" in raw.getvalue()
    assert b"?" not in raw.getvalue()
    assert raw.getvalue().count(b"\n ok ") > 3


@pytest.mark.parametrize(("role", "by_word", "expected"), [
    ("trainer", True, "file"), ("trainer", False, "environment"), ("operator", True, "environment"),
])  # fmt: skip
def test_it_looks_at_the_hub_that_the_service_itself_would_dial(
    words: list[str], role: str, by_word: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "key.json"
    KeyFile("ppo", role, "192.0.2.7:5550", Credentials(Pair.new().public, Pair.new())).write(path)
    monkeypatch.setenv("AMI_HUB", "192.0.2.8:5550")
    doctor(words[1:], path, named_by_word=by_word)
    told = capsys.readouterr().out
    assert {"file": "192.0.2.7:5550", "environment": "192.0.2.8:5550"}[expected] in told


@pytest.mark.parametrize(
    ("more", "got", "told"),
    [
        ([], "realtime", "✓ the body's loop runs at realtime priority"),
        ([], "normal", "the body's loop runs at normal priority, for realtime priority is not permitted here"),
        (["pace=free"], "normal", "✓ the body's loop runs at normal priority"),
    ],
)
def test_the_priority_of_a_body_s_loop_is_told(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    got: str,
    told: str,
) -> None:
    monkeypatch.setattr(doctoring, "set_thread_priority", lambda _: got)
    doctor([*words, *more])
    assert told in " ".join(capsys.readouterr().out.split())
