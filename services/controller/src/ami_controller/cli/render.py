"""The status for people: readable in three seconds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ami_shared.health import LOOP_STUCK_S

COLOURS = {
    "running": "green", "paused": "yellow", "pausing": "yellow", "starting": "cyan", "blind": "red",
    "lost": "bold red", "absent": "red", "stopping": "magenta",
}  # fmt: skip

UNBOUNDED = 1 << 16  # columns of a screen
CLOCK_WORTH_TELLING_S = 1.0
LATE_RECORD_S = 10.0
AGES = "the link or the trainer is too slow, or one of the clocks is wrong"
COUNTED = {
    "wire_errors": "{} malformed messages dropped",
    "messages_dropped": "{} messages to the controller dropped: its link does not carry them",
    "metrics_dropped": "{} metrics dropped",
    "not_finite": "{} times what it observed or computed was not finite: nothing was learned from that",
    "skipped": "{} gradient steps skipped: loss or gradient not finite",
    "restored": "{} times back to the last good parameters",
    "poisoned": "{} snapshots not published: not finite",
}


def render_status(status: Mapping[str, Any]) -> RenderableType:
    """Return the whole status as text with tables."""
    parts: list[RenderableType] = [_headline(status)]
    parts += [Text(f"! {line}", style="bold red") for line in troubles(status)]
    parts.append(_services(status))
    if any(service.get("buffer") for service in status["services"]):
        parts.append(_training(status))
    if status["experience"]:
        parts.append(_experience(status))
    if status["models"]:
        parts.append(_models(status))
    parts.append(_checkpoint(status["hub"]["checkpoint"]))
    return Group(*parts)


def _state(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))


def _headline(status: Mapping[str, Any]) -> Text:
    hub = status["hub"]
    line = Text("AMI is ") + _state(status["system"])
    line.append(f"   hub {hub['address']}   up {duration(hub['uptime_s'])}   {hub['run_dir']}", style="dim")
    return line


class Columns:
    """A table that omits columns, rather than digits, if the screen is narrow."""

    def __init__(self, *columns: str, spared: Sequence[str] = ()) -> None:
        """Start a table without rows.

        Args:
            columns: the headings.
            spared: those that may be omitted, the most dispensable first.
        """
        self._columns, self._spared = columns, spared
        self._rows: list[tuple[RenderableType, ...]] = []

    def add_row(self, *cells: RenderableType) -> None:
        """Add a row; cells that are not given are empty."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left_out: set[str] = set()
        for column in (None, *self._spared):
            left_out |= {column} if column else set()
            table = self._without(left_out)
            if Measurement.get(console, options.update(max_width=UNBOUNDED), table).maximum <= options.max_width:
                break
        yield table

    def _without(self, left_out: Collection[str]) -> Table:
        shown = [i for i, column in enumerate(self._columns) if column not in left_out]
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for i in shown:
            table.add_column(Text(self._columns[i]), justify="left" if i == 0 else "right", no_wrap=True)
        for cells in self._rows:
            table.add_row(*(cells[i] for i in shown if i < len(cells)))
        return table


def _services(status: Mapping[str, Any]) -> Columns:
    columns = ("service", "state", "host", "rate", "late", "p99 late", "waits", "memory", "heard")
    table = Columns(*columns, spared=("heard", "memory", "host", "waits", "p99 late"))
    for service in status["services"]:
        if service["state"] == "absent":
            table.add_row(service["name"], _state("absent"))
            continue
        table.add_row(
            service["name"],
            _state(service["state"]),
            Text(service["host"]),
            f"{service['rate_hz']:.1f}/s",
            _late(service),
            f"{service['tick_lateness_ms']['p99']:.1f} ms" if service["tick_lateness_ms"] else "",
            _share(service["waiting_share"]),
            f"{service['memory_bytes'] / 1e6:.0f} MB",
            f"{service['heartbeat_age_s']:.1f} s",
        )
    return table


def _training(status: Mapping[str, Any]) -> Columns:
    """Return the table of trainers; of their limiters' counters, those that are not 0 for all of them."""
    trainers = [service for service in status["services"] if service.get("buffer")]
    told = [(name, value) for trainer in trainers for name, value in (trainer["limiter"] or {}).items()]
    limits = list(dict.fromkeys(name for name, value in told if value))
    columns = ("training", "steps", "buffer", "loss", "fresh error", *limits)
    table = Columns(*columns, spared=(*reversed(limits), "buffer", "fresh error"))
    for trainer in trainers:
        limiter = trainer["limiter"] or {}
        table.add_row(
            trainer["name"],
            str(trainer["steps"]),
            _buffer(trainer["buffer"]),
            number(trainer["losses"].get("loss")),
            _fresh(trainer["fresh_error"]),
            *(Text(_count(limiter.get(name))) for name in limits),
        )
    return table


def _count(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, int | float) and math.isfinite(value) else str(value or "")


def _late(service: Mapping[str, Any]) -> str:
    if service["late_ticks"] is None:
        return ""
    return f"{service['late_ticks']} of {service['steps']}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _buffer(buffer: Mapping[str, Any] | None) -> str:
    return f"{buffer['fill']}/{buffer['capacity']}" if buffer else ""


def _fresh(error: Mapping[str, Any] | None) -> str:
    if not error or error["now"] is None:
        return ""
    return f"{number(error['first'])} → {number(error['now'])}"


def _experience(status: Mapping[str, Any]) -> Columns:
    counters = ("received", "behind", "missed", "lost")
    columns = ("experience", "published", "retained", "trainer", *counters, "rate", "age")
    table = Columns(*columns, spared=("retained", "published", "missed", "rate", "age"))
    for stream in status["experience"]:
        about = [stream["body"], str(stream["published"]), _retained(stream["retained"])]
        if not stream["received"]:
            table.add_row(*about)
        for trainer in stream["received"]:
            counts = (str(stream[counter].get(trainer, 0)) for counter in counters)
            table.add_row(*about, trainer, *counts, _intake_rate(stream, trainer), _age(stream, trainer))
            about = ["", "", ""]
    return table


def _intake_rate(stream: Mapping[str, Any], trainer: str) -> str:
    rate = stream["intake_rate_hz"].get(trainer)
    return "" if rate is None else f"{rate:.0f}/s"


def _age(stream: Mapping[str, Any], trainer: str) -> str:
    age_s = stream["record_age_s"].get(trainer)
    return "" if age_s is None else f"{age_s:.2f} s"


def _retained(ring: Mapping[str, Any] | None) -> str:
    return f"{ring['records']} ({ring['bytes'] / 1e6:.0f} of {ring['capacity_bytes'] / 1e6:.0f} MB)" if ring else ""


def _models(status: Mapping[str, Any]) -> Columns:
    table = Columns("model", "version", "age", "size", "in use", spared=("size", "age", "in use"))
    for model in status["models"]:
        used = "  ".join(_use(body, version, model["lag"][body]) for body, version in model["used"].items())
        age = "" if model["age_s"] is None else f"{model['age_s']:.1f} s"
        size = f"{model['bytes'] / 1e6:.1f} MB" if model["bytes"] else ""
        table.add_row(model["name"], str(model["version"]), age, size, used)
    return table


def _use(body: str, version: int, lag: int) -> str:
    return f"{body} v{version}" + (f" ({lag} behind)" if lag > 1 else "")


def _checkpoint(checkpoint: Mapping[str, Any]) -> Text:
    line = Text("checkpoint ", style="bold")
    if checkpoint["newest"]:
        about = f"{checkpoint['newest']}, {duration(checkpoint['age_s'])} old, {checkpoint['bytes'] / 1e6:,.1f} MB"
        line.append(about, style="not bold")
    else:
        line.append("none yet", style="not bold")
    if saving := checkpoint["saving"]:
        line.append(f"   saving {saving['checkpoint']}: {saving['bytes'] / 1e6:,.1f} of ", style="not bold")
        line.append(f"{saving['of_bytes'] / 1e6:,.1f} MB", style="not bold")
        waiting = [name for name, part in saving["services"].items() if part["of_bytes"] is None]
        line.append(f", waiting for the cut of {', '.join(waiting)}" if waiting else "", style="not bold")
    return line


def troubles(status: Mapping[str, Any]) -> list[str]:
    """Return one line for everything that needs a person's attention."""
    lines = [f"{s['name']}: {s['trouble']}" for s in status["services"] if s.get("trouble")]
    lines += [f"{s['name']} is {s['state']}" for s in status["services"] if s["state"] in ("lost", "absent")]
    for service in status["services"]:
        counts = {**(service.get("limiter") or {}), **service}
        lines += [f"{service['name']}: {tell.format(counts[of])}" for of, tell in COUNTED.items() if counts.get(of)]
        down = [name for name, link in service.get("links", {}).items() if link["state"] != "up"]
        if down and service["state"] not in ("lost", "absent"):
            lines.append(f"{service['name']}: no link to the hub for {' and '.join(down)}: reconnecting")
        stuck_s = service.get("loop_age_s") or 0.0
        if stuck_s > LOOP_STUCK_S and service["state"] not in ("lost", "absent"):
            lines.append(f"{service['name']}: its loop has not moved for {duration(stuck_s)}: a long step, or it hangs")
        clock = service.get("clock") or {}
        if abs(clock.get("offset_s") or 0.0) > CLOCK_WORTH_TELLING_S:
            lines.append(
                f"{service['name']}: clock of {service['host']} is {-clock['offset_s']:+.1f} s off: allowed for"
            )
    for stream in status["experience"]:
        for name in (name for name, n in stream["lost"].items() if n):
            newest = f"lately from {stream['lost_from'][name]} to before {stream['lost_to'][name]}"
            lines.append(f"{name} lost {stream['lost'][name]} records of {stream['body']}, {newest}")
        lines += [
            f"records of {stream['body']} reach {name} {age_s:+.0f} s after they were made: {AGES}"
            for name, age_s in stream["record_age_s"].items()
            if age_s is not None and not -CLOCK_WORTH_TELLING_S <= age_s <= LATE_RECORD_S
        ]
        if stream["overflowed"]:
            lines.append(f"{stream['body']} could not send {stream['overflowed']} records fast enough: they are lost")
        if stream["unsendable"]:
            lines.append(f"{stream['body']}: {stream['unsendable']} records cannot be sent: its log says what is wrong")
    hub, tracker = status["hub"], status["tracker"]
    malformed = hub["wire_errors"] + hub["snapshots_refused"]
    if hub["answers_dropped"]:
        lines.append(f"hub: {hub['answers_dropped']} answers dropped: a peer asks faster than it reads")
    if malformed:
        lines.append(f"hub: {malformed} malformed messages dropped")
    if hub["handshakes_failed"]:
        lines.append(f"hub: connections that failed in the handshake: {hub['handshakes_failed']}")
    if hub["security"] == "INSECURE":
        lines.append("hub: INSECURE: without keys, whoever reaches it can read everything and command the system")
    if hub["refused"]:
        lines.append("hub: refused " + ", ".join(f"{n} {what}" for what, n in sorted(hub["refused"].items())))
    own = (hub["keys_trouble"], hub["parameters_trouble"], hub["checkpoint"]["trouble"])
    lines += [f"hub: {trouble}" for trouble in own if trouble]
    if tracker["trouble"]:
        lines.append(f"tracker: {tracker['trouble']}; {tracker['queued']} points wait")
    if tracker["dropped"]:
        lines.append(f"tracker: {tracker['dropped']} points dropped")
    return lines


def number(value: float | None) -> str:
    """Return a short form of a number: four significant digits."""
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return seconds as 12s, 3m20s, 4h05m or 2d03h."""
    whole = int(seconds)
    for unit, size, small, small_size in (
        ("d", 86_400, "h", 3_600),
        ("h", 3_600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small_size:02d}{small}"
    return f"{whole}s"
