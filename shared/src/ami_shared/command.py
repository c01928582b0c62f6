"""What every service's command does the same way: logging, signals, supervision by a parent, exit codes.

A first signal (SIGINT, SIGTERM, or a terminal's end) asks for an orderly end; a second one of the first two forces it.
A supervisor (AMI_SUPERVISED=1) asks for an orderly end by the line END on standard input, too. If that ends without
such a line, the supervisor is gone: what a service then does is its own to say (StopFlag.on_abandoned), e.g. save.
The exit code tells whether a signal (128 plus its number) or the system (0) asked for the end.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ami_shared.errors import AmiError, ConfigurationError
from ami_shared.logs import configure_logging
from ami_shared.process import end_at_once, read_pipe

log = logging.getLogger("ami")

LAUNCH = "AMI_LAUNCH"  # environment variable: which `ami up` has started a service
END = b"end\n"
ABANDONED_S = 150.0  # for a service without a supervisor to end by itself
ONE_WISH_S = 0.5  # two signals within this time are one: `timeout` signals a process, then its whole group
RUNTIME = "install Microsoft's Visual C++ Redistributable, https://aka.ms/vc14/vc_redist.x64.exe"
TOO_LITTLE_MEMORY = 1455
NOT_LOADED = {  # Windows' errors with which a library is not loaded → what to do
    126: RUNTIME,
    127: RUNTIME,
    1114: RUNTIME,
    TOO_LITTLE_MEMORY: "enlarge the paging file in Windows' settings, or run fewer services on this machine",
}
MOST_CRASH_REPORTS = 20  # of one service: one that crashes is restarted, and may crash for months


class StopFlag:
    """Whether the process has been asked to end."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._when_abandoned: list[Callable[[], None]] = []
        self._abandoned = False
        self.signal = 0  # that asked for the end, if one did

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it is set or the time is up; return whether it is set."""
        return self._event.wait(timeout_s)

    def set(self) -> None:
        """Ask for the end, and run the callbacks of on_set()."""
        self._event.set()
        while self._callbacks:
            self._callbacks.pop()()

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the flag is set (at once if it is)."""
        self._callbacks.append(callback)
        if self.is_set():
            self.set()

    def on_abandoned(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the supervisor is gone (at once if it is, perhaps twice); it must lead to the end.

        Without any callback the flag is set as soon as the supervisor is gone, otherwise after ABANDONED_S.
        """
        self._when_abandoned.append(callback)
        if self._abandoned:
            callback()

    def abandon(self) -> None:
        """Let the process end because its supervisor is gone."""
        self._abandoned = True
        callbacks = list(self._when_abandoned)
        for callback in callbacks:
            callback()
        if callbacks:
            self.wait(ABANDONED_S)
        self.set()


def run_command(name: str, main: Callable[[list[str], StopFlag], None]) -> NoReturn:
    """Run a service's main function and leave the process with the right exit code."""
    tolerate_any_text()
    configure_logging(stamped=not supervised(), stream=sys.stderr)  # else the supervisor adds the time
    stop = StopFlag()
    watch_signals(stop)
    if supervised():
        threading.Thread(target=_watch_supervisor, args=(stop,), name="supervisor", daemon=True).start()
    died = end_with_any_thread(stop)
    code = exit_code(name, lambda: main(sys.argv[1:], stop)) or (1 if died else 0)
    if code == 0 and stop.signal and supervised():
        code = 128 + stop.signal  # tells the supervisor that this was not the system's end
    leave(code)


def leave(code: int) -> NoReturn:
    """Write out the last lines, and end this process: a thread that hangs in a camera driver must not hold it."""
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    end_at_once(code)


def end_with_any_thread(stop: StopFlag) -> list[str]:
    """Let the whole process end when one of its threads dies: half a service is worse than none.

    Returns the names of threads that died, filled as it happens.
    """
    died: list[str] = []

    def report(death: threading.ExceptHookArgs) -> None:
        died.append(death.thread.name if death.thread else "unknown")
        reason = f"{death.exc_type.__name__}: {death.exc_value}"
        log.error("thread %s died of %s; ending this process, so that it is restarted", died[-1], reason)
        stop.set()

    threading.excepthook = report
    return died


def exit_code(name: str, main: Callable[[], int | None]) -> int:
    """Run `main`, turn what it raises into one line for the user, and return the exit code."""
    try:
        return main() or 0
    except AmiError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError as error:
        return 0 if _nobody_reads() else _defect(name, error)
    except OSError as error:
        number = getattr(error, "winerror", None)
        if number not in NOT_LOADED:
            return _defect(name, error)
        log.error("a library cannot be loaded (%s): %s", error, NOT_LOADED[number])
        return 1 if number == TOO_LITTLE_MEMORY else ConfigurationError.exit_code  # 1: may be temporary
    except MemoryError as error:
        log.error("this machine's memory does not suffice (%s): make buffers or models smaller", error or "no details")
        return 1
    except Exception as error:
        return _defect(name, error)


def _nobody_reads() -> bool:
    """Return whether standard output is a pipe whose reader has seen enough."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    if not hasattr(select, "poll"):
        return False
    poller = select.poll()
    poller.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def _defect(name: str, error: Exception) -> int:
    place = _write_crash_report(name)
    log.error("unexpected %s: %s (%s; details in %s)", type(error).__name__, error, _whose(error), place)
    return 1


def _whose(error: Exception) -> str:
    """Return whose defect an error is, by where it was raised: components may be the user's own."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    module = str(frame.f_globals.get("__name__"))
    if module.startswith("ami_"):
        return "a defect of AMI"
    return f"raised in {module}, line {line}: a defect of it, or of AMI"


def supervised() -> bool:
    """Whether a supervisor started this process and holds its standard input open."""
    return os.environ.get("AMI_SUPERVISED") == "1"


def tolerate_any_text() -> None:
    """Let text be printed that the terminal, or a file on Windows, cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def watch_signals(stop: StopFlag, when_forced: Callable[[], None] = lambda: None) -> None:
    """Set the flag on SIGINT, SIGTERM or the closing of the terminal.

    A second signal calls `when_forced` and ends the process at once.
    """
    hangups = {getattr(signal, name, None) for name in ("SIGHUP", "SIGBREAK")}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # the last two when the terminal is closed
        number = getattr(signal, name, None)
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # by nohup
            signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        with sender:
            stop.signal = receiver.recv(1)[0]
            begin = time.monotonic()
            stop.set()
            while True:
                second = receiver.recv(1)[0]  # not that the terminal is closed while the end is under way
                if second not in hangups and time.monotonic() - begin > ONE_WISH_S:
                    when_forced()
                    end_at_once(128 + second)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _watch_supervisor(stop: StopFlag) -> None:
    said = b""
    with contextlib.suppress(OSError, ValueError):
        while END not in said and (more := read_pipe(0)):
            said = said[-len(END) :] + more
    if END in said:
        stop.set()
    else:
        stop.abandon()


def _write_crash_report(name: str) -> str:
    report, beginning = traceback.format_exc(), f"ami-{name}-crash-"
    try:
        folder = Path(tempfile.gettempdir())
        path = folder / f"{beginning}{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        path.write_text(report, encoding="utf-8", errors="replace")
    except OSError:
        return report
    for old in sorted(folder.glob(f"{beginning}*.txt"))[:-MOST_CRASH_REPORTS]:
        with contextlib.suppress(OSError):
            old.unlink()
    return str(path)
