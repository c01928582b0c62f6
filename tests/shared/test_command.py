from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ami_shared import errors
from ami_shared.command import ONE_WISH_S, StopFlag, exit_code, supervised
from ami_shared.service_command import service_main


def failing(error: BaseException) -> Callable[[], int | None]:
    def main() -> int | None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.AmiError("a"), 1),
        (errors.WireError("b"), 1),
        (errors.SensorLostError("c"), 1),
        (errors.ConfigurationError("d"), 2),
        (errors.JoinRefusedError("e"), 2),
        (errors.NoControllerError("f"), 3),
        (errors.DeadlineError("g"), 4),
    ],
)
def test_every_error_has_its_exit_code_and_is_one_line(
    error: errors.AmiError, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert exit_code("test", failing(error)) == code
    assert [record.getMessage() for record in caplog.records] == [str(error)]
    assert caplog.records[0].exc_info is None


def test_an_end_without_error_has_its_own_exit_code() -> None:
    assert exit_code("test", lambda: None) == 0
    assert exit_code("test", lambda: 7) == 7
    assert exit_code("test", failing(KeyboardInterrupt())) == 130
    assert exit_code("test", failing(BrokenPipeError())) == 0


def test_memory_that_does_not_suffice_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    assert exit_code("test", failing(MemoryError("Unable to allocate 2.00 TiB"))) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert "memory does not suffice (Unable to allocate 2.00 TiB)" in line
    assert "defect" not in line


def test_a_defect_is_one_line_and_its_traceback_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert exit_code("test", failing(ZeroDivisionError("oh"))) == 1
    (report,) = tmp_path.iterdir()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "ZeroDivisionError: oh" in line
    assert str(report) in line
    assert "Traceback" not in line
    assert caplog.records[0].exc_info is None
    assert "Traceback" in report.read_text()


def test_the_stop_flag_calls_everybody_once() -> None:
    flag, called = StopFlag(), []
    flag.on_set(lambda: called.append("early"))
    assert not flag.is_set()
    assert not flag.wait(0.0)
    flag.set()
    flag.set()
    flag.on_set(lambda: called.append("late"))
    assert called == ["early", "late"]
    assert flag.wait(0.0)


def test_a_supervisor_says_so_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_SUPERVISED", "1")
    assert supervised()
    monkeypatch.setenv("AMI_SUPERVISED", "0")
    assert not supervised()


PROGRAM = """
import sys
from ami_shared.command import run_command
def main(arguments, stop):
    print("ready", flush=True)
    if "break" in arguments:
        import threading
        threading.Thread(target=lambda: 1 / 0, name="intake").start()
    assert stop.wait(20)
    print("orderly", flush=True)
    if "hang" in arguments:
        import threading
        threading.Event().wait(20)
run_command("test", main)
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Also where nohup has started these tests."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HANGUP}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *HANGUP])
def test_the_first_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert (out, err, process.returncode) == ("orderly\n", "", 0)


@pytest.mark.skipif(not HANGUP, reason="terminals do not hang up here")
def test_what_nohup_started_stays_when_the_terminal_is_closed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=5)[0] == "orderly\n"


@pytest.mark.skipif(not HANGUP, reason="terminals do not hang up here")
def test_a_terminal_that_is_closed_meanwhile_does_not_force_the_end() -> None:
    process = start("hang")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "orderly\n"
    time.sleep(2 * ONE_WISH_S)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_second_signal_forces_the_end_but_not_the_echo_of_the_first() -> None:
    process = start("hang")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "orderly\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2 * ONE_WISH_S)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")


def test_a_thread_that_dies_takes_the_process_along_in_an_orderly_way() -> None:
    with start("break") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()  # through the buffer that "ready" came from
    assert (out, process.returncode) == ("orderly\n", 1)
    assert "thread intake died of ZeroDivisionError: division by zero" in err
    assert err.count("\n") == 1


def test_the_end_of_the_supervisor_asks_for_an_orderly_end() -> None:
    process = start(AMI_SUPERVISED="1")
    out, _ = process.communicate(timeout=5)  # closes its standard input
    assert (out, process.returncode) == ("orderly\n", 0)


def test_a_supervisor_that_asks_in_both_ways_forces_nothing() -> None:
    process = start("hang", AMI_SUPERVISED="1")
    assert process.stdin is not None
    process.stdin.close()
    assert process.stdout is not None
    assert process.stdout.readline() == "orderly\n"
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(5) == 128 + signal.SIGTERM
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def test_without_a_supervisor_the_end_of_input_means_nothing() -> None:
    process = start(AMI_SUPERVISED="0")
    assert process.stdin is not None
    process.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()


class Served:
    def __init__(self) -> None:
        self.overrides: list[str] | None = None

    def __call__(self, overrides: list[str], stop: StopFlag) -> None:
        self.overrides = overrides


def test_overrides_go_to_the_service(configs: Path) -> None:
    served = Served()
    service_main("body", ["seed=3", "experiment=noise"], StopFlag(), "usage", served)
    assert served.overrides == ["seed=3", "experiment=noise"]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_goes_to_standard_output_and_serves_nothing(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    served = Served()
    service_main("body", [word], StopFlag(), "usage", served)
    assert capsys.readouterr().out == "usage"
    assert served.overrides is None


def test_cfg_prints_the_composed_configuration(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service_main("body", ["--cfg", "seed=41"], StopFlag(), "usage", Served())
    assert "seed: 41" in capsys.readouterr().out


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.AmiError, match="--nope") as caught:
        service_main("body", ["--nope"], StopFlag(), "usage", Served())
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "usage"


@pytest.mark.parametrize(
    ("role", "override", "name"),
    [
        ("body", "inference.name=legs", "legs"),
        ("trainer", "seed=0", "image_vae"),
        ("controller", "seed=0", "controller"),
    ],
)
def test_health_looks_at_the_file_of_this_very_service(
    role: str, override: str, name: str, configs: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from ami_shared.health import HealthFile, health_path

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(errors.AmiError, match="not running") as caught:
        service_main(role, ["--health", override], StopFlag(), "usage", Served())
    assert caught.value.exit_code == 1
    HealthFile(health_path(5550, role, name)).write("running", 0.0, linked=True)
    service_main(role, ["--health", override], StopFlag(), "usage", Served())
    assert capsys.readouterr().out.startswith(f"{role} {name}: running")


def test_a_thread_that_dies_ends_the_process_with_one_line_and_exit_code_1() -> None:
    script = (
        "import threading\n"
        "from ami_shared.command import run_command\n"
        "def main(words, stop):\n"
        "    threading.Thread(target=lambda: 1 / 0, name='intake').start()\n"
        "    assert stop.wait(5.0)\n"
        "run_command('test', main)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "thread intake died of ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr
