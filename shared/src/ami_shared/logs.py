"""Log lines that nobody has to wait for: a thread writes them, and drops them while the screen takes none.

A terminal whose reader has paused it, or has selected text in it on Windows, blocks whoever writes to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from typing import TextIO

MOST_UNWRITTEN = 10_000  # lines
LAST_LINES_S = 2.0  # for the screen to take the last ones


class BackgroundHandler(logging.Handler):
    """Writes each record as a line, in a thread."""

    def __init__(self, stream: TextIO) -> None:
        """Start the thread.

        Args:
            stream: where the lines go.
        """
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str] = queue.Queue(MOST_UNWRITTEN)
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line; never blocks."""
        try:
            line = self.format(record)
        except Exception:  # a message whose arguments do not fit must not end its sender
            self.handleError(record)
            return
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def flush(self) -> None:
        """Wait until everything is written, for a bounded time."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, LAST_LINES_S)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                self._stream.write(f"{line}\n")
                self._stream.flush()
            self._lines.task_done()


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
