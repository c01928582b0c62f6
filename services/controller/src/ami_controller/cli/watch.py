"""`ami watch`: the status live, with sparklines of the main metrics."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ami_controller.cli.client import Client
from ami_controller.cli.render import number, render_status
from ami_shared.bus import HubAddress
from ami_shared.errors import ConfigurationError, NoControllerError

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60


def sparkline(values: list[float]) -> str:
    """Return values as bars scaled between their minimum and maximum; `!` stands for a value that is not finite."""
    halves = [value / 2 for value in values]  # so that differences do not overflow
    finite = [value for value in halves if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low or 1.0
    return "".join(BARS[min(7, int((v - low) / span * 8))] if math.isfinite(v) else "!" for v in halves)


class History:
    """The last values of the main metrics."""

    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WIDTH))

    def add(self, status: Mapping[str, Any]) -> None:
        """Take one status into the history."""
        for name, value in main_metrics(status):
            self._values[name].append(value)

    def render(self, most: int) -> RenderableType:
        """Return one sparkline per metric, `most` at most."""
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        for name, values in list(self._values.items())[:most]:
            table.add_row(name, Text(sparkline(list(values)), style="cyan"), number(values[-1]))
        return table


def main_metrics(status: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield what is worth a sparkline."""
    for service in status["services"]:
        if service["state"] == "absent":
            continue
        yield f"{service['name']} rate /s", service["rate_hz"]
        if service["tick_lateness_ms"]:
            yield f"{service['name']} p99 late ms", service["tick_lateness_ms"]["p99"]
        if service["fresh_error"] and service["fresh_error"]["now"] is not None:
            yield f"{service['name']} fresh error", service["fresh_error"]["now"]
        for name, value in service["losses"].items():
            yield f"{service['name']} {name}", value


def picture(status: Mapping[str, Any], history: History, console: Console) -> RenderableType:
    """Return the status, and below it as many sparklines as fit on the screen."""
    shown = render_status(status)
    room = console.height - len(console.render_lines(shown)) - 1
    return Group(shown, Text(), history.render(room)) if room > 1 else shown


def watch(hub: HubAddress, interval_s: float = 0.5) -> None:
    """Show the status until Ctrl-C; wait through the controller's absence.

    Raises:
        ConfigurationError: the output is not a terminal.
    """
    console = Console()
    if not console.is_terminal:
        raise ConfigurationError("`ami watch` needs a terminal: without one, use `ami status`")
    history = History()
    with Client(hub) as client, Live(Text(f"asking {hub} …"), console=console, auto_refresh=False) as live:
        while True:
            try:
                status = client.status()
                history.add(status)
                shown = picture(status, history, console)
            except NoControllerError as error:
                shown = Text(str(error), style="red")
            live.update(shown, refresh=True)
            time.sleep(interval_s)
