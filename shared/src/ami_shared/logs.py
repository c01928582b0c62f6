"""Log lines that nobody has to wait for: a thread writes them; while the screen takes none, they are dropped.

A terminal whose reader has paused it, or has selected text in it on Windows, blocks whoever writes to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, TextIO, TypeVar

MOST_UNWRITTEN = 10_000  # lines
LAST_LINES_S = 2.0  # for the screen to take the last ones


Line = TypeVar("Line")


class LineWriter(Generic[Line]):
    """Writes lines in a thread."""

    def __init__(self, write: Callable[[Line], None]) -> None:
        """Start the thread.

        Args:
            write: writes one line, and may block; what it raises because nobody reads any more is ignored.
        """
        self._write = write
        self._lines: queue.Queue[Line] = queue.Queue(MOST_UNWRITTEN)
        threading.Thread(target=self._run, name="lines", daemon=True).start()

    def put(self, line: Line) -> None:
        """Queue a line; never blocks."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def flush(self) -> None:
        """Wait until everything is written, for a bounded time."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, LAST_LINES_S)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            with contextlib.suppress(OSError, ValueError):
                self._write(line)
            self._lines.task_done()


class BackgroundHandler(logging.Handler):
    """Writes each record as a line, in a thread."""

    def __init__(self, stream: TextIO) -> None:
        """Start the thread.

        Args:
            stream: where the lines go.
        """
        super().__init__()
        self._stream = stream
        self._lines = LineWriter(self._write)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line; never blocks."""
        try:
            line = self.format(record)
        except Exception:  # a message whose arguments do not fit must not end its sender
            self.handleError(record)
            return
        self._lines.put(line)

    def flush(self) -> None:
        """Wait until everything is written, for a bounded time."""
        self._lines.flush()

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


def configure_logging(stamped: bool, stream: TextIO) -> None:
    """Log one line an event.

    Args:
        stamped: whether lines begin with the time.
        stream: where they go.
    """
    level = os.environ.get("AMI_LOG_LEVEL", "INFO").upper()
    handler = BackgroundHandler(stream)
    handler.setFormatter(
        logging.Formatter(f"{'%(asctime)s ' if stamped else ''}%(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else "INFO", handlers=[handler])
