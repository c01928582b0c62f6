from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ami_controller.cli.up as up_module
from ami_controller.cli.client import Client
from ami_controller.cli.log_view import LogView
from ami_controller.cli.main import COMMANDS, build_parser, describe_outcome, finite, seconds
from ami_controller.cli.up import Service, Up, own_hub, services_of
from ami_controller.coordinator import LONGEST_COMMAND_S
from ami_controller.key_folder import KeyFolder
from ami_controller.places import check_bind_address, prepare_run_dir
from ami_shared.bus import HubAddress
from ami_shared.config import load_config
from ami_shared.errors import ConfigurationError, DisplacedError, NoControllerError
from ami_shared.files import lock_folder


def ami(*words: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ami_controller.cli.main", *words],
        env={**os.environ, **environment}, cwd=folder, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nope"], "invalid choice: 'nope'"),
        ([], "COMMAND"),
        (["status", "extra"], "unrecognised: extra"),
        (["status", "hub=there:5550"], "unrecognised: hub=there:5550 (for hub=there:5550 say --hub there:5550)"),
        (["pause", "--nope"], "unrecognised: --nope"),
        (["pause", "--timeout", "soon"], "--timeout"),
        (["pause", "--timeout", "0"], "at most 600 seconds"),
        (["resume", "--timeout", "601"], "at most 600 seconds"),
        (["shutdown", "--timeout", "nan"], "at most 600 seconds"),
        (["status", "--hub", "nowhere"], "hub='nowhere'"),
        (["up", "experiment=nope"], "experiment/nope"),
        (["up", "--nope"], "unrecognised: --nope"),
        (["up", "trainer=nobody"], "it has: image_vae"),
        (["up", "~hub"], "'hub'"),
        (["up", "trainers.image_vae=null"], "trainers.image_vae must be a section"),
        (["up", "trainers.image_vae.service=3"], "trainers.image_vae must be a section"),
        (["up", "inference.environment.sensor=null"], "inference.environment.sensor=null"),
        (["keys", "list", "--dir", "nowhere"], "has no keys"),
        (["checkpoints", "--dir", "nowhere"], "nowhere is not a folder"),
        (["checkpoints", "list", "this"], "list takes no names"),
        (["doctor", "--join", "nowhere.json"], "cannot be read"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_use_is_exit_code_2_and_no_traceback(words: list[str], told: str, tmp_path: Path, configs: Path) -> None:
    done = ami(*words, folder=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bad_hub_in_the_environment_is_exit_code_2() -> None:
    done = ami("status", AMI_HUB="nowhere")
    assert done.returncode == 2
    assert "hub='nowhere'" in done.stderr


def test_no_controller_is_exit_code_3(hub: HubAddress) -> None:
    done = ami("status", "--hub", str(hub))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert f"no controller answers at {hub}" in done.stderr


def test_help_tells_of_every_command_and_exit_code() -> None:
    done = ami("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout
    assert "exit codes: 0 done" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["status", "--json"], {"command": "status", "json": True, "hub": None, "join": None}),
        (["pause", "--hub", "a:1", "--timeout", "2.5"], {"hub": "a:1", "timeout": 2.5}),
        (["up", "experiment=noise", "models=tiny"], {"overrides": ["experiment=noise", "models=tiny"]}),
        (["doctor"], {"overrides": [], "join": None}),
    ],
    ids=str,
)
def test_the_command_line_is_understood(
    words: Sequence[str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AMI_HUB", raising=False)
    arguments = vars(build_parser().parse_args(words))
    assert {key: arguments[key] for key in expected} == expected


def test_every_command_has_its_function() -> None:
    choices = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(choices) == set(COMMANDS)


def test_the_hub_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_HUB", "example.org:6000")
    assert build_parser().parse_args(["watch"]).hub == "example.org:6000"
    assert build_parser().parse_args(["watch", "--hub", "b:1"]).hub == "b:1"


def test_a_timeout_is_what_the_controller_is_willing_to_wait() -> None:
    assert seconds("0.5") == 0.5
    assert seconds(str(LONGEST_COMMAND_S)) == LONGEST_COMMAND_S
    for text in ("0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(argparse.ArgumentTypeError):
            seconds(text)


def test_an_outcome_tells_who_confirmed_after_how_long() -> None:
    told = describe_outcome("pause", {"took_s": {"body": 0.0123, "image_vae": 0.2}})
    assert told.splitlines() == ["paused; confirmed by 2:", "  body  12 ms", "  image_vae  200 ms"]


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"checkpoint": "2026-01-01_00-00-00"}, "saved as checkpoint 2026-01-01_00-00-00"),
        ({"unsaved": "ppo cannot be reached"}, "NOT saved: ppo cannot be reached"),
    ],
)
def test_the_outcome_of_a_shutdown_tells_whether_it_was_saved(told: dict[str, str], line: str) -> None:
    assert describe_outcome("shutdown", {"took_s": {}, **told}).splitlines()[-1].strip() == line


@pytest.mark.parametrize(
    ("experiment", "names"),
    [
        ("simulated", ["controller", "world", "body", "image_vae", "forward_dynamics", "ppo"]),
        ("noise", ["controller", "body", "image_vae"]),
    ],
)
def test_up_starts_what_the_experiment_needs(experiment: str, names: list[str], configs: Path) -> None:
    given = [f"experiment={experiment}", "trainer=image_vae", "seed=3"]
    services = services_of(load_config(given), given)
    assert [service.name for service in services] == names
    for service in services:
        assert {f"experiment={experiment}", "seed=3"} <= set(service.command)
        trainers = ("image_vae", "forward_dynamics", "ppo")
        told = [f"trainer={service.name}"] if service.name in trainers else []
        assert [word for word in service.command if word.startswith("trainer=")] == told


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_loopback_interface_may_be_bound(host: str) -> None:
    assert not check_bind_address(host, None, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.0.0.1", "example.org"])
def test_nothing_else_is_bound_unless_asked_for_in_so_many_words(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigurationError, match=r"`ami keys init`.*`ami keys add .*controller\.insecure=true"):
        check_bind_address(host, None, insecure=False)
    assert not check_bind_address(host, "keys", insecure=False)
    assert not caplog.text
    assert check_bind_address(host, None, insecure=True)
    assert "INSECURE" in caplog.text


def test_a_run_dir_is_made_and_one_that_cannot_be_is_a_configuration_error(tmp_path: Path) -> None:
    made = prepare_run_dir(tmp_path / "a" / "b")
    assert made.is_dir()
    assert list(made.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"run_dir=.*cannot be written to"):
        prepare_run_dir(tmp_path / "file" / "run")


def test_numbers_that_json_cannot_write_are_null() -> None:
    status = {"a": [1.5, float("nan")], "b": {"c": float("inf"), "d": "x", "e": None, "f": True}}
    assert finite(status) == {"a": [1.5, None], "b": {"c": None, "d": "x", "e": None, "f": True}}


def test_an_operator_s_key_in_the_environment_is_not_that_of_services_that_up_starts(
    tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMI_JOIN", str(tmp_path / "me.key.json"))
    told = tmp_path / "told"
    script = f"import os; open({str(told)!r}, 'w').write(os.environ.get('AMI_JOIN', 'none'))"
    view = LogView(["body"], tmp_path / "up.log")
    supervisor = Up(load_config(["experiment=noise"]), [Service("body", [sys.executable, "-c", script])], view)
    supervisor._start("body")
    with supervisor._processes["body"]:  # closes its pipes
        assert supervisor._ended.get(timeout=20) == ("body", 0)
    view.close()
    assert told.read_text() == "none"


def test_keys_that_are_there_say_for_which_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def init(*hub: str) -> None:
        COMMANDS["keys"](build_parser().parse_args(["keys", "init", "--dir", str(tmp_path / "keys"), *hub]))

    for hub in (["--hub", "10.0.0.1:5550"], ["--hub", "10.0.0.1:5550"], []):
        init(*hub)
    assert capsys.readouterr().out.count("left as they are") == 2
    with pytest.raises(ConfigurationError, match=r"connect to 10\.0\.0\.1:5550.*--hub 10\.0\.0\.2:5550"):
        init("--hub", "10.0.0.2:5550")


@pytest.mark.parametrize(("port", "elsewhere"), [(5550, ""), (6960, " --hub 127.0.0.1:6960")])
def test_up_tells_how_to_ask_a_hub_with_keys(port: int, elsewhere: str, tmp_path: Path, configs: Path) -> None:
    KeyFolder(tmp_path / "keys").init(HubAddress.parse("127.0.0.1:5550"))
    view: Any = SimpleNamespace(line=lambda name, text: lines.append(text))
    lines: list[str] = []
    words = [f"hub=127.0.0.1:{port}", f"controller.key_folder={tmp_path}/keys"]
    own_hub(load_config(words), view)
    assert lines[0].endswith(f"local-operator.key.json{elsewhere}")


def test_a_second_up_leaves_the_log_of_the_living_one_alone(tmp_path: Path, configs: Path) -> None:
    with lock_folder(tmp_path, "controller"), pytest.raises(ConfigurationError, match="is used by another controller"):
        up_module.up(["experiment=noise", f"run_dir={tmp_path}"])
    assert not (tmp_path / "up.log").exists()


def test_a_disk_that_is_full_does_not_make_the_end_a_failure(tmp_path: Path) -> None:
    if not (full := Path("/dev/full")).exists():
        pytest.skip("no full disk here")
    view = LogView(["body"], full)
    view.line("body", "INFO hello")
    view.close()


def test_lines_in_the_file_are_dated(tmp_path: Path) -> None:
    view = LogView(["body"], tmp_path / "up.log")
    view.line("body", "INFO hello")
    view.close()
    stamp, told = (tmp_path / "up.log").read_text().split(" body ")
    assert abs(time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) - time.time()) < 3600
    assert told.strip() == "hello"


def test_a_screen_that_is_gone_or_stands_still_holds_nobody_up(tmp_path: Path) -> None:
    """Half of the lines go to a pipe that nobody reads any more, or one that is full."""
    script = (
        "import sys, pathlib; from ami_controller.cli.log_view import LogView;"
        "view = LogView(['body'], pathlib.Path(sys.argv[1]));"
        "[view.line('body', f'INFO {n} ' + 'x' * 200) for n in range(20_000)];"
        "view.close()"
    )
    for name, closed in (("gone", True), ("still", False)):
        path = tmp_path / name
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        if closed:
            process.stdout.close()
        with process:
            try:
                assert process.wait(timeout=60) == 0
                assert len(path.read_text().splitlines()) == 20_000
            finally:
                process.kill()


def test_a_service_that_cannot_be_started_again_is_tried_later(
    tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = LogView(["body"], tmp_path / "up.log")
    supervisor = Up(load_config(["experiment=noise"]), [Service("body", [str(tmp_path / "nothing")])], view)
    supervisor._supervision.started("body", 0.0)
    supervisor._supervision.ended("body", 1, 0.0)
    assert supervisor._look_after() is None
    (child,) = supervisor._supervision.children.values()
    assert child.restart_at is not None
    log = (tmp_path / "up.log").read_text()
    assert "body could not be started (" in log
    assert "starting it again in 1 s" in log
    view.close()


class Hub:
    """What `ami up` sees of a controller at its hub."""

    def __init__(self, silent: int = 0, launch: str | None = None) -> None:
        self.silent, self.launch = silent, launch
        self.asked: list[str] = []

    def __call__(self, hub: HubAddress) -> Hub:
        return self

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None: ...

    def status(self) -> dict[str, Any]:
        self.silent -= 1
        if self.silent >= 0:
            raise NoControllerError("no controller answers")
        return {"hub": {"launch": self.launch}}

    def command(self, kind: str, timeout_s: float) -> None:
        self.asked.append(kind)


@pytest.mark.parametrize(
    ("silent", "exit_code", "own", "asked", "told"),
    [
        (2, None, True, ["shutdown"], ""),
        (0, None, False, [], "ending without a save: another system's controller answers"),
        (2, -9, True, ["shutdown"], ""),
        (0, DisplacedError.exit_code, True, [], "ending without a save: the controller is not running"),
        (0, 0, True, [], ""),
        (10**9, None, True, [], "ending without a save: no controller answers"),
    ],
    ids=["busy", "another's", "killed", "displaced", "ended in an orderly way", "hangs"],
)
def test_the_end_is_saved_or_says_why_not(
    silent: int,
    exit_code: int | None,
    own: bool,
    asked: list[str],
    told: str,
    tmp_path: Path,
    configs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = LogView(["body"], tmp_path / "up.log")
    supervisor = Up(load_config(["experiment=noise"]), [], view)
    hub = Hub(silent, supervisor._launch if own else "another")
    monkeypatch.setattr(up_module, "Client", hub)
    monkeypatch.setattr(up_module, "ASKING_S", 0.05 if silent > 5 else 60.0)
    supervisor._processes["controller"] = SimpleNamespace(poll=lambda: exit_code)  # type: ignore[assignment]
    supervisor._supervision.whole = True
    supervisor._supervision.started("controller", time.monotonic())
    if exit_code is not None:
        supervisor._supervision.ended("controller", exit_code, time.monotonic())
    supervisor._let_it_save()
    view.close()
    log = (tmp_path / "up.log").read_text()
    assert hub.asked == asked
    assert ("warning" in log, told in log) == (bool(told), True)


class Forgetful(Hub):
    """A controller that dies in every command."""

    def command(self, kind: str, timeout_s: float) -> None:
        super().command(kind, timeout_s)
        raise NoControllerError(f"{kind}: the controller was restarted before it was done")


def test_a_controller_that_dies_in_every_save_is_not_asked_for_ever(
    tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = LogView(["body"], tmp_path / "up.log")
    supervisor = Up(load_config(["experiment=noise"]), [], view)
    hub = Forgetful(0, supervisor._launch)
    monkeypatch.setattr(up_module, "Client", hub)
    supervisor._supervision.started("controller", time.monotonic())
    assert supervisor._let_it_save() == 0
    assert hub.asked == [], "what never ran has nothing to save"
    supervisor._supervision.whole = True
    assert supervisor._let_it_save() == 0
    assert len(hub.asked) == up_module.MOST_TRIES
    view.close()
    assert "ending without a save: shutdown: the controller was restarted" in (tmp_path / "up.log").read_text()


def test_the_end_waits_for_no_controller_that_died_after_the_first_goodbye(
    tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = LogView(["body"], tmp_path / "up.log")
    supervisor = Up(load_config(["experiment=noise"]), [], view)
    monkeypatch.setattr(up_module, "Client", Hub(10**9))
    now = time.monotonic()
    for name in ("controller", "body"):
        supervisor._supervision.started(name, now)
    supervisor._supervision.whole = True
    supervisor._ended.put(("body", 0))
    supervisor._ended.put(("controller", -signal.SIGKILL))
    assert supervisor._let_it_save() == 1
    view.close()


def test_a_wait_for_an_answer_can_be_interrupted_on_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll there notices no Ctrl-C before its end."""
    polls: list[int] = []
    with Client(HubAddress("127.0.0.1", 9)) as client, monkeypatch.context() as during:
        during.setattr(client, "_socket", SimpleNamespace(poll=lambda ms: polls.append(ms) or time.sleep(0.05)))
        assert client._receive(1, ("result",), 0.5) is None
    assert max(polls) <= 200
