"""Priorities are set in threads of their own: a test must not slow down the ones after it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import ami_shared.priority as priority
from ami_shared.errors import ConfigurationError

resource = pytest.importorskip("resource")  # Windows has none
linux_only = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this platform has no SCHED_IDLE")


def in_a_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(120.0)
    return results[0]


def forbidden(*_: Any) -> None:
    raise PermissionError


def allowed(level: str) -> bool:
    return in_a_thread(lambda: priority.set_thread_priority(level)) == level


@linux_only
def test_idle_is_really_idle_and_only_for_the_calling_thread() -> None:
    got = in_a_thread(lambda: (priority.set_thread_priority("idle"), os.sched_getscheduler(0)))
    assert got == ("idle", os.SCHED_IDLE)
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


@linux_only
def test_nice_is_the_weakest_ordinary_share() -> None:
    got = in_a_thread(lambda: (priority.set_thread_priority("nice"), os.getpriority(os.PRIO_PROCESS, 0)))
    assert got == ("nice", 19)


@linux_only
def test_normal_changes_nothing() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    got = in_a_thread(lambda: (priority.set_thread_priority("normal"), os.getpriority(os.PRIO_PROCESS, 0)))
    assert got == ("normal", before)


@linux_only
def test_a_platform_without_idle_falls_back_to_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "SCHED_IDLE")
    assert in_a_thread(lambda: priority.set_thread_priority("idle")) == "nice"


@linux_only
def test_a_forbidden_idle_falls_back_to_nice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    assert in_a_thread(lambda: priority.set_thread_priority("idle")) == "nice"


@linux_only
def test_where_nothing_is_allowed_it_says_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "SCHED_IDLE")
    monkeypatch.setattr(os, "setpriority", forbidden)
    assert in_a_thread(lambda: priority.set_thread_priority("idle")) == "normal"


@linux_only
@pytest.mark.parametrize("level", ["idle", "nice"])
def test_other_threads_get_it_too_unless_they_have_ended(level: str) -> None:
    ours, ids, before = threading.Event(), priority.thread_ids(), os.getpriority(os.PRIO_PROCESS, 0)
    other = threading.Thread(target=ours.wait)
    other.start()
    (begun,) = priority.thread_ids() - ids
    ended = in_a_thread(threading.get_native_id)
    assert in_a_thread(lambda: priority.set_thread_priority(level, also=(ended, begun))) == level
    got = (os.sched_getscheduler(begun), os.getpriority(os.PRIO_PROCESS, begun))
    ours.set()
    assert got == ((os.SCHED_IDLE, before) if level == "idle" else (os.SCHED_OTHER, 19))


@linux_only
def test_realtime_is_for_the_thread_alone_and_not_for_what_it_starts() -> None:
    if not allowed("realtime"):
        pytest.skip("real-time priority is not permitted here")

    def measure() -> tuple[int, int, int]:
        assert priority.set_thread_priority("realtime") == "realtime"
        own = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
        look = "import os; print(os.sched_getscheduler(0))"
        process = int(subprocess.run([sys.executable, "-c", look], capture_output=True, check=True).stdout)
        return own, in_a_thread(lambda: os.sched_getscheduler(0)), process

    assert in_a_thread(measure) == (os.SCHED_RR, os.SCHED_OTHER, os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@linux_only
def test_a_forbidden_realtime_falls_back_to_a_larger_share(monkeypatch: pytest.MonkeyPatch) -> None:
    if not allowed("raised"):
        pytest.skip("a larger share is not permitted here")
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    got = in_a_thread(lambda: (priority.set_thread_priority("realtime"), os.getpriority(os.PRIO_PROCESS, 0)))
    assert got == ("raised", -10)


@linux_only
def test_a_single_core_is_left_to_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    got = in_a_thread(lambda: (priority.set_thread_priority("realtime"), os.sched_getscheduler(0)))
    assert got[0] in ("raised", "normal")
    assert got[1] == os.SCHED_OTHER


@linux_only
def test_a_process_that_would_be_killed_for_long_steps_is_not_realtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200_000, 200_000))
    got = in_a_thread(lambda: (priority.set_thread_priority("realtime"), os.sched_getscheduler(0)))
    assert got[0] in ("raised", "normal")
    assert got[1] == os.SCHED_OTHER


@linux_only
@pytest.mark.parametrize("level", ["realtime", "raised"])
def test_without_any_permission_it_stays_normal(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    monkeypatch.setattr(os, "setpriority", forbidden)
    got = in_a_thread(lambda: (priority.set_thread_priority(level), os.getpriority(os.PRIO_PROCESS, 0)))
    assert got == ("normal", os.getpriority(os.PRIO_PROCESS, 0))


def test_an_unknown_level_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="'urgent' is not one of realtime, raised, normal, nice, idle"):
        priority.set_thread_priority("urgent")
