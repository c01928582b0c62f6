"""One log of all services for `ami up`: coloured on the screen, and copied into a file of the run's directory."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ami_shared.errors import ConfigurationError
from ami_shared.logs import LineWriter

COLOURS = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green", "bright_magenta")
LEVEL_STYLES = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}


class Screen(Console):
    """Standard output; once its reader is gone, nothing is shown."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class LogView:
    """One readable log of all services, coloured by service, and a copy in a file in the run's directory.

    A screen that is blocked, e.g. paused by its reader, blocks no service: what it cannot take is in the file.
    """

    def __init__(self, names: list[str], path: Path) -> None:
        """Open the log file and the screen.

        Args:
            names: of the services.
            path: of the file.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        self._screen = Screen(highlight=False)
        self._colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        self._width = max(map(len, names))
        try:
            self._file = path.open("a", buffering=1, encoding="utf-8", errors="replace")
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from None
        self._lock = threading.Lock()
        self._shown = LineWriter(self._show)

    def line(self, name: str, text: str) -> None:
        """Show one line of one service."""
        level, _, message = text.partition(" ")
        if level not in logging.getLevelNamesMapping():
            level, message = "", text
        day, stamp = time.strftime("%Y-%m-%d %H:%M:%S").split()
        shown = Text(f"{stamp} ", style="dim")
        shown.append(f"{name:<{self._width}} ", style=self._colours.get(name, "bold white"))
        label = f"{level.lower()}: " if level in LEVEL_STYLES else ""
        shown.append(label + message.strip(), style=LEVEL_STYLES.get(level, ""))
        self._shown.put(shown)
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._file.write(f"{day} {stamp} {name:<{self._width}} {label}{message.strip()}\n")

    def _show(self, line: Text) -> None:
        self._screen.print(line, soft_wrap=True)

    def close(self) -> None:
        """Show the remaining lines, if the screen takes them in time."""
        self._shown.flush()
        with contextlib.suppress(OSError):  # a disk that is full
            self._file.close()
