"""How a controller ends that a signal ends alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ami_controller import service
from ami_controller.service import Controller
from ami_controller.state import RunState, load_state
from ami_shared.command import StopFlag


class Saving:
    """A save that takes so long."""

    def __init__(self, takes_s: float = 0.0, trouble: str = "") -> None:
        self._takes_s, self._trouble = takes_s, trouble
        self._ends_at = 0.0
        self.begun = 0

    def begin(self, now: float, timeout_s: float) -> str:
        assert timeout_s == service.SHARE_FOR_SAVING * service.SIGNAL_SAVE_S
        self.begun += 1
        self._ends_at = now + self._takes_s
        return self._trouble

    @property
    def busy(self) -> bool:
        return time.monotonic() < self._ends_at

    trouble = None


def ending(
    saving: Saving, monkeypatch: pytest.MonkeyPatch, signal: int = 15, stopping: bool = False, save_s: float = 0.3
) -> float:
    """Let a controller that serves nobody end; return how long that took."""
    monkeypatch.setattr(service, "SIGNAL_SAVE_S", save_s)
    made: Any = object.__new__(Controller)
    quiet = SimpleNamespace(start=lambda: None, wake=lambda: None, shut_down=lambda: None)
    made._router = made._store = made._keeper = made._writer = made._tracker = quiet
    made._doorkeeper, made._forwarders = None, []
    made._lifecycle = SimpleNamespace(desired=SimpleNamespace(paused=False, stopping=stopping))
    made._saves_at_end, made._checkpointing = True, saving
    made.address, made._run_dir = "here", SimpleNamespace(resolve=lambda: "there")
    made._serve_once = lambda: time.sleep(0.01)
    made._wait_for_goodbyes, made._close = lambda stop: None, lambda: None
    stop = StopFlag()
    stop.signal = signal
    stop.set()
    begin = time.monotonic()
    made.serve(stop)
    return time.monotonic() - begin


def test_it_waits_for_its_save(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    saving = Saving(takes_s=0.1)
    assert ending(saving, monkeypatch, save_s=10.0) >= 0.1
    assert saving.begun == 1
    assert "without a save" not in caplog.text


def test_a_save_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert ending(Saving(takes_s=60.0), monkeypatch) < 30.0
    assert "ending without a save: the save takes too long" in caplog.text


def test_what_cannot_be_saved_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ending(Saving(trouble="body cannot be reached"), monkeypatch)
    assert "ending without a save: body cannot be reached" in caplog.text


@pytest.mark.parametrize(("signal", "stopping"), [(0, False), (15, True)])
def test_one_whose_supervisor_or_thread_is_gone_or_who_was_told_to_end_does_not_save(
    signal: int, stopping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Saving(takes_s=60.0)
    assert ending(saving, monkeypatch, signal, stopping) < 30.0
    assert saving.begun == 0


def waiting_for_goodbyes(
    monkeypatch: pytest.MonkeyPatch, under_way_s: float, leaves_after_s: float = 60.0, signalled: bool = False
) -> float:
    """Let a controller wait for one member, in a shutdown that its operator gives so long; return how long it did."""
    monkeypatch.setattr(service, "GOODBYE_S", 0.1)
    begin = time.monotonic()

    def passed() -> float:
        return time.monotonic() - begin

    class Asked:
        desired = SimpleNamespace(stopping=True)
        give_up = staticmethod(lambda now: None)

        @property
        def under_way(self) -> bool:
            return passed() < under_way_s

    made: Any = object.__new__(Controller)
    member = SimpleNamespace(name="image_vae")
    made._lifecycle = Asked()
    made._registry = SimpleNamespace(living=lambda: [member] if passed() < leaves_after_s else [])
    made._router, made._coordinator = SimpleNamespace(serve_once=lambda coordinator: None), None
    made._serve_once = lambda: time.sleep(0.01)
    stop = StopFlag()
    if signalled:
        stop.set()
    made._wait_for_goodbyes(stop)
    return passed()


def test_a_goodbye_that_takes_long_is_waited_for_as_long_as_the_operator_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.5 <= waiting_for_goodbyes(monkeypatch, under_way_s=60.0, leaves_after_s=0.5) < 30.0


@pytest.mark.parametrize("signalled", [False, True])
def test_one_that_does_not_end_is_named_when_nobody_waits_any_more(
    signalled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    took_s = waiting_for_goodbyes(monkeypatch, under_way_s=60.0 if signalled else 0.4, signalled=signalled)
    assert (0.1 if signalled else 0.4) <= took_s < 30.0
    assert "image_vae did not end within" in caplog.text


def test_what_could_not_be_written_whole_is_written_whole_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = object.__new__(Controller)
    made._saving, made._whole_due, made._numbered, made._state_trouble = threading.Lock(), False, 0, None
    made._run_dir, made._state = tmp_path, RunState()
    made._lifecycle = SimpleNamespace(desired=SimpleNamespace(paused=True, epoch=1))

    def fail(*_: object) -> None:
        raise OSError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(service, "save_state", fail)
        made._remember()
        assert "no room" in made._state_trouble
        made._state.versions["image_encoder"] = 4
        made._remember()
        assert made._state_trouble, "versions alone are not all"
    made._save()
    assert made._state_trouble is None
    kept = load_state(tmp_path)
    assert (kept.paused, kept.epoch, kept.versions) == (True, 1, {"image_encoder": 4})
