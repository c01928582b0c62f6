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
from ami_shared.bus import HubAddress
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


def test_a_defect_is_told_with_where_it_was_raised(caplog: pytest.LogCaptureFixture) -> None:
    assert exit_code("test", failing(ZeroDivisionError("division"))) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"unexpected ZeroDivisionError: division (raised in {__name__}, line ")
    caplog.clear()
    assert exit_code("test", lambda: HubAddress.parse(None)) == 1  # type: ignore[arg-type]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "a defect of AMI; details in " in line


def test_an_end_without_error_has_its_own_exit_code() -> None:
    assert exit_code("test", lambda: None) == 0
    assert exit_code("test", lambda: 7) == 7
    assert exit_code("test", failing(KeyboardInterrupt())) == 130


@pytest.mark.parametrize(("reader", "code"), [("gone", 0), ("there", 1)])
def test_a_broken_pipe_is_no_error_where_nobody_reads_the_output_any_more(reader: str, code: int) -> None:
    """Any other, e.g. an actuator's, is."""
    script = (
        "import sys; from ami_shared.command import exit_code\n"
        "def main():\n"
        "    print('x' * 100, flush=True)\n"
        "    raise BrokenPipeError\n"
        "sys.exit(exit_code('test', main))"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        if reader == "gone":
            process.stdout.close()
        assert process.wait(60) == code


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


def test_who_asks_late_what_to_do_without_a_supervisor_is_told_at_once() -> None:
    flag, called = StopFlag(), []
    flag.abandon()
    assert flag.is_set(), "nobody had anything to do"
    flag.on_abandoned(lambda: called.append("late"))
    assert called == ["late"]


def test_a_supervisor_says_so_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMI_SUPERVISED", "1")
    assert supervised()
    monkeypatch.setenv("AMI_SUPERVISED", "0")
    assert not supervised()


PROGRAM = """
import sys
from ami_shared import command
for word in sys.argv[1:]:
    if word.startswith("one_wish_s="):
        command.ONE_WISH_S = float(word.partition("=")[2])
def main(arguments, stop):
    if "abandoned" in arguments:
        command.ABANDONED_S = float(arguments[-1])
        stop.on_abandoned(lambda: print("abandoned", flush=True))
    print("ready", flush=True)
    if "break" in arguments:
        import threading
        threading.Thread(target=lambda: 1 / 0, name="intake").start()
    assert stop.wait(20)
    print("orderly", flush=True)
    if "hang" in arguments:
        import threading
        threading.Event().wait(20)
command.run_command("test", main)
"""


def text(output: bytes) -> str:
    return output.decode().replace(os.linesep, "\n")


class Command:
    """A process that runs PROGRAM; every wait for it is bounded, and long enough for a busy machine."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            bufsize=0,  # else line() would keep what follows the line, and communicate() would not find it
            env={**os.environ, **environment},
        )  # fmt: skip
        assert self.line() == "ready\n"

    def line(self) -> str:
        assert self._process.stdout is not None
        return text(self._process.stdout.readline())

    def say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode())

    def close_stdin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.stdin = None  # communicate() would flush it

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def lives_on(self, seconds: float = ONE_WISH_S) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def force(self, number: signal.Signals) -> None:
        """Signal until it ends: a signal that comes too soon after the first is taken for the same wish."""
        deadline = time.monotonic() + PATIENCE_S
        while self.lives_on():
            assert time.monotonic() < deadline
            self.signal(number)

    def end(self) -> tuple[int, str, str]:
        """Close its standard input, and return the exit code, the rest of its output and its errors."""
        out, err = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, text(out), text(err)

    def kill(self) -> None:
        with self._process:  # whatever is still open is closed
            self._process.kill()


Start = Callable[..., Command]
PATIENCE_S = 30.0
HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


@pytest.fixture
def start() -> Iterator[Start]:
    commands: list[Command] = []

    def begin(*arguments: str, **environment: str) -> Command:
        commands.append(Command(*arguments, **environment))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill()


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Also where nohup has started these tests."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HANGUP}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *HANGUP])
def test_the_first_signal_asks_for_an_orderly_end(start: Start, number: signal.Signals) -> None:
    command = start()
    command.signal(number)
    assert command.end() == (0, "orderly\n", "")


@pytest.mark.skipif(not HANGUP, reason="terminals do not hang up here")
def test_what_nohup_started_stays_when_the_terminal_is_closed(start: Start) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    command.signal(signal.SIGHUP)
    assert command.lives_on()
    command.signal(signal.SIGTERM)
    assert command.end() == (0, "orderly\n", "")


@pytest.mark.skipif(not HANGUP, reason="terminals do not hang up here")
def test_a_terminal_that_is_closed_meanwhile_does_not_force_the_end(start: Start) -> None:
    command = start("hang")
    command.signal(signal.SIGINT)
    assert command.line() == "orderly\n"
    time.sleep(2 * ONE_WISH_S)
    command.signal(signal.SIGHUP)
    assert command.lives_on()
    command.signal(signal.SIGTERM)
    assert command.end() == (128 + signal.SIGTERM, "", "")


def test_the_second_signal_forces_the_end_but_not_the_echo_of_the_first(start: Start) -> None:
    echoing, forced = start("hang", "one_wish_s=60"), start("hang", "one_wish_s=0")
    for command in (echoing, forced):
        command.signal(signal.SIGTERM)
        assert command.line() == "orderly\n"
        command.signal(signal.SIGTERM)
    assert echoing.lives_on(2 * ONE_WISH_S)
    assert forced.end() == (128 + signal.SIGTERM, "", "")


def test_a_thread_that_dies_takes_the_process_along_in_an_orderly_way(start: Start) -> None:
    code, out, err = start("break").end()
    assert (code, out) == (1, "orderly\n")
    assert "thread intake died of ZeroDivisionError: division by zero" in err
    assert err.count("\n") == 1


def test_the_end_of_the_supervisor_asks_for_an_orderly_end(start: Start) -> None:
    command = start(AMI_SUPERVISED="1")
    assert command.end() == (0, "orderly\n", "")


def test_who_is_abandoned_ends_by_itself_or_after_a_while(start: Start) -> None:
    patient, hasty = start("abandoned", "60", AMI_SUPERVISED="1"), start("abandoned", "0", AMI_SUPERVISED="1")
    for command in (patient, hasty):
        command.say("en")
        command.close_stdin()
        assert command.line() == "abandoned\n"
    assert hasty.end() == (0, "orderly\n", "")
    assert patient.lives_on()
    patient.signal(signal.SIGTERM)
    assert patient.end() == (128 + signal.SIGTERM, "orderly\n", "")


def test_a_supervisor_s_word_asks_for_an_orderly_end_and_nobody_is_abandoned(start: Start) -> None:
    command = start("abandoned", "60", AMI_SUPERVISED="1")
    command.say("e")
    command.say("nd\n")
    assert command.line() == "orderly\n"
    command.close_stdin()
    assert command.end() == (0, "", "")


def test_a_supervisor_that_asks_in_both_ways_forces_nothing(start: Start) -> None:
    command = start("hang", AMI_SUPERVISED="1")
    command.close_stdin()
    assert command.line() == "orderly\n"
    command.signal(signal.SIGTERM)
    assert command.lives_on()
    command.force(signal.SIGTERM)
    assert command.end() == (128 + signal.SIGTERM, "", "")


def test_without_a_supervisor_the_end_of_input_means_nothing(start: Start) -> None:
    command = start(AMI_SUPERVISED="0")
    command.close_stdin()
    assert command.lives_on()
    command.signal(signal.SIGTERM)
    assert command.end() == (0, "orderly\n", "")


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
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)  # no report grows old while this test is held up
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


@pytest.mark.parametrize(
    ("winerror", "code", "told"), [(1114, 2, "vc_redist"), (126, 2, "vc_redist"), (1455, 1, "paging file")]
)
def test_a_library_that_windows_does_not_load_is_no_defect(
    winerror: int, code: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    def main() -> None:
        error = OSError(22, "A dynamic link library (DLL) initialization routine failed")
        error.winerror = winerror  # type: ignore[attr-defined]
        raise error

    assert exit_code("test", main) == code
    assert told in caplog.text
    assert "defect" not in caplog.text
