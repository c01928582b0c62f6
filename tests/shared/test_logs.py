"""Log lines beside a screen that takes none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

from ami_shared import logs
from ami_shared.logs import BackgroundHandler


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("ami", logging.WARNING, "x.py", 1, message, arguments, None)


def test_a_screen_that_stands_still_holds_nobody_up_and_gets_the_first_and_last_lines() -> None:
    inward, outward = os.pipe()
    with os.fdopen(outward, "w") as screen:
        handler = BackgroundHandler(screen)
        begin = time.monotonic()
        for n in range(2 * logs.MOST_UNWRITTEN):
            handler.emit(record(f"{n} %s", "x" * 100))
        assert time.monotonic() - begin < 30.0
        with os.fdopen(inward) as reader:
            assert reader.readline().startswith("0 xxx")
            while not (line := reader.readline()).startswith(f"{logs.MOST_UNWRITTEN - 1} "):
                assert line
            handler.emit(record("it goes on"))
            while "it goes on" not in reader.readline():
                pass
            handler.flush()


def test_the_end_waits_for_the_last_line_but_not_for_ever() -> None:
    script = (
        "import logging, sys\n"
        "from ami_shared.command import leave\n"
        "from ami_shared.logs import configure_logging\n"
        "configure_logging(stamped=False, stream=sys.stderr)\n"
        "for n in range(int(sys.argv[1])):\n"
        "    logging.warning('%d %s', n, 'x' * 100)\n"
        "leave(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "500"], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("WARNING 499 xxx")
    with subprocess.Popen([sys.executable, "-c", script, "5000"], stderr=subprocess.PIPE) as unread:
        assert unread.wait(timeout=60) == 7


def test_a_message_whose_arguments_do_not_fit_ends_nobody() -> None:
    with open(os.devnull, "w") as nowhere:
        handler = BackgroundHandler(nowhere)
        handler.emit(record("%d", "no number"))
        handler.flush()
