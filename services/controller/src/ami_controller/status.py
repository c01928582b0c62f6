"""The status of the whole system as one JSON-ready map: the stable interface of `ami status --json`.

docs/status.md documents every key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ami_controller.registry import Member
from ami_shared import limits


def build_status(
    system: str,
    members: Iterable[Member],
    expected: Iterable[str],
    hub: Mapping[str, Any],
    tracker: Mapping[str, Any],
    kept_versions: Mapping[str, int],
    now: float,
) -> dict[str, Any]:
    """Assemble the status from what every member last reported."""
    known = sorted(members, key=lambda m: ("body", "trainer").index(m.role) if m.role in ("body", "trainer") else 9)
    known = [replace(member, statistics=plausible(member.statistics)) for member in known]
    absent = [name for name in expected if name not in {member.name for member in known}]
    return {
        "system": system,
        "services": [_service(member, now) for member in known] + [_absent(name) for name in absent],
        "experience": [_experience(body, known) for body in known if body.role == "body"],
        "models": _models(known, kept_versions, now),
        "hub": dict(hub),
        "tracker": dict(tracker),
    }


def _number(value: Any) -> bool:
    """Return whether a value is a number; integers must be small enough for their sums to fit a message."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < limits.MAX_NUMBER)


def _map_of(fits: Callable[[Any], bool], *needed: str) -> Callable[[Any], bool]:
    """Return a test for maps from names, which include `needed`, to values that pass `fits`."""

    def test(value: Any) -> bool:
        if not isinstance(value, Mapping) or not set(needed) <= value.keys():
            return False
        return all(isinstance(name, str) and fits(item) for name, item in value.items())

    return test


_plain = _map_of(lambda value: value is None or isinstance(value, int | float | str))


def _snapshot_facts(value: Any) -> bool:
    numbers = _plain(value) and all(v is None or _number(v) for v in value.values())
    return bool(numbers and _number(value.get("version")))


def _link_facts(value: Any) -> bool:
    return bool(_plain(value) and isinstance(value.get("state"), str) and _number(value.get("lost")))


SNAPSHOT_COUNTERS = (
    "snapshots_published", "snapshots_overtaken", "snapshot_bytes_sent",
    "snapshots_received", "snapshots_from_memory", "snapshots_from_wire", "snapshots_passed_over",
    "snapshot_bytes_received",
)  # fmt: skip
OF_SENDING = ("published", "overflowed", "unsendable", "unsent", "resent", "wishes_dropped", "bytes_sent")
OF_STREAMS = (
    "received", "lost", "lost_from", "lost_to", "behind",
    "gaps", "missed", "duplicates", "postponed", "fetched", "asked",
)  # fmt: skip
FIGURES = ("record_age_s", "intake_rate_hz", "catch_up_hz", "bytes_received", "records_from_memory")  # of streams
EXPECTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            "uptime_s", "loop_age_s", "rate_hz", "late_ticks", "skipped_ticks", "steps", "updates", "segment",
            "memory_bytes", "gpu_memory_bytes", "cpu_cores", "threads", "wire_errors", "experience_wire_errors",
            "snapshots_refused", "metrics_dropped", "messages_dropped", "waiting_share", "poisoned",
            "blind_ticks", "not_finite", *OF_SENDING, *SNAPSHOT_COUNTERS,
        ),
        _number,
    ),
    "clock": _plain,
    "tick_lateness_ms": _map_of(_number, "p50", "p95", "p99", "max"),
    "losses": _map_of(_number),
    "fresh_error": _map_of(lambda value: value is None or _number(value), "first", "now"),
    "buffer": lambda value: _plain(value) and {"fill", "capacity"} <= value.keys(),
    "limiter": _plain,
    "streams": _map_of(_map_of(_number)),
    "retained": _map_of(_number, "records", "bytes", "capacity_bytes"),
    "models": _map_of(_snapshot_facts),
    "replicas": _map_of(_snapshot_facts),
    "record_lag": _map_of(_map_of(_number)),
    "links": _map_of(_link_facts),
    "environment": _plain,
    "agent": _plain,
    "trouble": lambda value: isinstance(value, str),
}  # fmt: skip


def plausible(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the well-formed ones of a member's statistics, which may come from third-party components."""
    told = {name: value for name, value in statistics.items() if value is not None and name in EXPECTED}
    odd = [name for name, value in told.items() if not EXPECTED[name](value)]
    kept = {name: value for name, value in told.items() if name not in odd}
    return kept | ({"trouble": f"malformed statistics: {', '.join(odd)}"} if odd else {})


def _service(member: Member, now: float) -> dict[str, Any]:
    told = member.statistics
    return {
        "name": member.name,
        "role": member.role,
        "host": member.host,
        "pid": member.pid,
        "state": "lost" if member.lost else member.state,
        "uptime_s": told.get("uptime_s", 0.0),
        "loop_age_s": told.get("loop_age_s"),
        "heartbeat_age_s": now - member.heard_at,
        "rate_hz": told.get("rate_hz", 0.0),
        "late_ticks": told.get("late_ticks"),
        "skipped_ticks": told.get("skipped_ticks"),
        "blind_ticks": told.get("blind_ticks"),
        "tick_lateness_ms": told.get("tick_lateness_ms"),
        "steps": told.get("steps", told.get("updates", 0)),
        "segment": told.get("segment"),
        "memory_bytes": told.get("memory_bytes", 0),
        "gpu_memory_bytes": told.get("gpu_memory_bytes"),
        "cpu_cores": told.get("cpu_cores", 0.0),
        "threads": told.get("threads", 0),
        "wire_errors": _sum_of(told, "wire_errors", "experience_wire_errors", "snapshots_refused"),
        "poisoned": told.get("poisoned", 0),
        "not_finite": told.get("not_finite", 0) + _whole(told.get("agent", {}).get("not_finite")),
        "metrics_dropped": told.get("metrics_dropped", 0),
        "messages_dropped": told.get("messages_dropped", 0),
        "trouble": told.get("trouble"),
        "losses": told.get("losses", {}),
        "fresh_error": told.get("fresh_error"),
        "buffer": told.get("buffer"),
        "limiter": told.get("limiter"),
        "waiting_share": told.get("waiting_share"),
        "links": told.get("links", {}),
        "clock": told.get("clock"),
        "environment": told.get("environment", {}),
        "agent": told.get("agent", {}),
        **{counter: told.get(counter) for counter in SNAPSHOT_COUNTERS},
    }


def _whole(value: Any) -> int:
    """Return a reported count, which may come from a third-party component; 0 if it is malformed."""
    return value if isinstance(value, int) and _number(value) else 0


def _sum_of(told: Mapping[str, Any], *names: str) -> int:
    return sum(told.get(name) or 0 for name in names)


def _absent(name: str) -> dict[str, Any]:
    """Return the status of a service that is expected, but absent."""
    nobody = _service(Member(name, "", "", 0, "", b"", 0.0, "absent", -1, {}), 0.0)
    return nobody | {"pid": None, "heartbeat_age_s": None}


def _experience(body: Member, members: list[Member]) -> dict[str, Any]:
    trainers = [member for member in members if member.role == "trainer"]
    streams = {trainer.name: trainer.statistics.get("streams", {}).get(body.name, {}) for trainer in trainers}
    return {
        "body": body.name,
        "retained": body.statistics.get("retained"),
        **{counter: body.statistics.get(counter, 0) for counter in OF_SENDING},
        **{counter: {name: of.get(counter, 0) for name, of in streams.items()} for counter in OF_STREAMS},
        **{figure: {name: of.get(figure) for name, of in streams.items()} for figure in FIGURES},
        "record_lag": {t.name: t.statistics.get("record_lag", {}).get(body.name, {}) for t in trainers},
    }


def _models(members: list[Member], kept: Mapping[str, int], now: float) -> list[dict[str, Any]]:
    made = {
        name: dict(about) | {"told_s_ago": now - m.heard_at}
        for m in members
        if m.role == "trainer"
        for name, about in m.statistics.get("models", {}).items()
    }
    models = []
    for name in sorted(set(made) | set(kept)):
        used = {m.name: m.statistics.get("replicas", {}).get(name) for m in members if m.role == "body"}
        newest = max(made.get(name, {}).get("version", 0), kept.get(name, 0))
        models.append(
            {
                "name": name,
                "version": newest,
                "age_s": _since_then(made.get(name, {})),
                "bytes": made.get(name, {}).get("bytes"),
                "kept_version": kept.get(name, 0),
                "used": {body: about["version"] for body, about in used.items() if about},
                "lag": {body: max(0, newest - about["version"]) for body, about in used.items() if about},
                "used_age_s": {body: about.get("age_s") for body, about in used.items() if about},
            }
        )
    return models


def _since_then(about: Mapping[str, Any]) -> float | None:
    """Return a snapshot's present age: its trainer reported it a while ago, if it is still alive."""
    return None if about.get("age_s") is None else float(about["age_s"] + about["told_s_ago"])
