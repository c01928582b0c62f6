"""How a controller ends that a signal ends alone."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from ami_controller import service
from ami_controller.service import Controller
from ami_shared.command import StopFlag


class Saving:
    """A save that takes so long."""

    def __init__(self, takes_s: float = 0.0, trouble: str = "") -> None:
        self._takes_s, self._trouble = takes_s, trouble
        self._ends_at = 0.0
        self.begun = 0

    def begin(self, now: float, timeout_s: float) -> str:
        self.begun += 1
        self._ends_at = now + self._takes_s
        return self._trouble

    @property
    def busy(self) -> bool:
        return time.monotonic() < self._ends_at

    trouble = None


def ending(saving: Saving, monkeypatch: pytest.MonkeyPatch, signal: int = 15, stopping: bool = False) -> float:
    """Let a controller that serves nobody end; return how long that took."""
    monkeypatch.setattr(service, "SIGNAL_SAVE_S", 0.3)
    made: Any = object.__new__(Controller)
    quiet = SimpleNamespace(start=lambda: None, wake=lambda: None)
    made._router = made._store = made._keeper = made._writer = made._tracker = quiet
    made._doorkeeper, made._forwarders = None, []
    made._lifecycle = SimpleNamespace(desired=SimpleNamespace(paused=False, stopping=stopping))
    made._saves_at_end, made._checkpointing = True, saving
    made.address, made._run_dir = "here", SimpleNamespace(resolve=lambda: "there")
    made._serve_once = lambda: time.sleep(0.01)
    made._wait_for_goodbyes = made._close = lambda: None
    stop = StopFlag()
    stop.signal = signal
    stop.set()
    begin = time.monotonic()
    made.serve(stop)
    return time.monotonic() - begin


def test_it_waits_for_its_save(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    saving = Saving(takes_s=0.1)
    assert ending(saving, monkeypatch) >= 0.1
    assert saving.begun == 1
    assert "without a save" not in caplog.text


def test_a_save_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert ending(Saving(takes_s=60.0), monkeypatch) < 5.0
    assert "ending without a save: the save takes too long" in caplog.text


def test_what_cannot_be_saved_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ending(Saving(trouble="body cannot be reached"), monkeypatch)
    assert "ending without a save: body cannot be reached" in caplog.text


@pytest.mark.parametrize(("signal", "stopping"), [(0, False), (15, True)])
def test_one_whose_supervisor_or_thread_is_gone_or_who_was_told_to_end_does_not_save(
    signal: int, stopping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Saving(takes_s=60.0)
    assert ending(saving, monkeypatch, signal, stopping) < 5.0
    assert saving.begun == 0
