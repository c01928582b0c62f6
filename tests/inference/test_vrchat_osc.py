from __future__ import annotations

import errno
import math
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from listening import Listener
from pythonosc.osc_message import OscMessage

from ami_inference.actuators import VRChatOSCDiscreteActuator, target, vrchat_osc
from ami_inference.actuators.controls import NEUTRAL
from ami_inference.actuators.vrchat_osc import datagram
from ami_inference.actuators.watchdog import ACTING, RESTING
from ami_shared.errors import ConfigurationError
from ami_shared.osc import resolve
from manual_clock import ManualClock

PollFor = Callable[..., Any]

FORWARD = np.array([1, 0, 2, 0, 1], np.int64)
FORWARD_VALUES = {**NEUTRAL, "/input/Vertical": 1.0, "/input/LookHorizontal": -1.0, "/input/Run": 1}
Make = Callable[..., VRChatOSCDiscreteActuator]


@pytest.fixture
def make(listener: Listener) -> Iterator[Make]:
    made: list[VRChatOSCDiscreteActuator] = []

    def actuator(**options: Any) -> VRChatOSCDiscreteActuator:
        made.append(VRChatOSCDiscreteActuator(**{"port": listener.port, "max_silence": 30.0} | options))
        assert listener.hear() == NEUTRAL  # at the start
        return made[-1]

    yield actuator
    for each in made:
        if each._socket.fileno() >= 0:
            each.close()
        each._watchdog.wait(30.0)  # close() does not wait for long: it would be called a leak of the next test


def test_an_action_is_sent_at_once_and_whole(make: Make, listener: Listener) -> None:
    make().act(FORWARD)
    assert listener.hear() == FORWARD_VALUES
    assert listener.hear(0.05) is None


def test_floats_travel_as_floats_and_ints_as_ints() -> None:
    for value in (0.5, 1):
        (told,) = OscMessage(datagram("/input/Run", value)).params
        assert type(told) is type(value)
        assert told == value


def test_rest_lets_go_and_resume_takes_the_held_action_up_again(make: Make, listener: Listener) -> None:
    actuator = make()
    actuator.act(FORWARD)
    listener.hear()
    actuator.neutral()
    assert listener.hear() == NEUTRAL
    actuator.resume()
    assert listener.hear() == FORWARD_VALUES


def test_the_end_lets_go_and_ends_the_watchdog(make: Make, listener: Listener) -> None:
    actuator = make()
    actuator.act(FORWARD)
    listener.hear()
    actuator.close()
    assert listener.hear() == NEUTRAL
    assert actuator._watchdog.wait(30) == 0
    assert listener.hear() == NEUTRAL  # the watchdog's own goodbye


def test_a_body_that_falls_silent_is_let_go_of(make: Make, listener: Listener) -> None:
    actuator = make(max_silence=0.2)
    actuator.act(FORWARD)
    assert listener.hear() == FORWARD_VALUES
    assert listener.hear() == NEUTRAL


def test_a_body_at_rest_is_left_alone(make: Make, listener: Listener) -> None:
    actuator = make(max_silence=2.0)
    actuator.act(FORWARD)
    actuator.neutral()
    listener.hear()
    listener.hear()
    assert listener.hear(4.0) is None


def test_a_watchdog_that_was_killed_is_started_again(
    make: Make, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    actuator = make(max_silence=2.0)
    first = actuator._watchdog
    first.kill()
    first.wait(5)
    for _ in range(2):
        actuator.act(FORWARD)
        assert listener.hear() == FORWARD_VALUES
    assert actuator._watchdog.pid != first.pid
    assert "watchdog" in caplog.text
    assert listener.hear() == NEUTRAL  # the new one watches


def test_axes_are_lagged_by_the_clock(make: Make, listener: Listener) -> None:
    clock = ManualClock()
    actuator = make(lag=0.2, clock=clock)
    clock.now = 0.1
    actuator.act(FORWARD)
    heard = listener.hear()
    assert heard is not None
    assert heard["/input/Vertical"] == pytest.approx(1 - math.exp(-0.5), abs=1e-6)
    assert heard["/input/Run"] == 1
    actuator.neutral()
    assert listener.hear() == NEUTRAL
    clock.now = 9.0  # a long rest must not count as time to follow in
    actuator.resume()
    heard = listener.hear()
    assert heard is not None
    assert heard["/input/Vertical"] == 0.0
    for clock.now in (10.0, 20.0):  # nor that of a body that sees nothing, which is put to rest again and again
        actuator.neutral()
        listener.hear()
    clock.now = 20.1
    actuator.act(FORWARD)
    heard = listener.hear()
    assert heard is not None
    assert heard["/input/Vertical"] == pytest.approx(1 - math.exp(-0.5), abs=1e-6)


def test_speeds_are_the_axes_magnitudes(make: Make, listener: Listener) -> None:
    make(speeds=(0.25, 0.5, 0.75)).act(np.array([2, 1, 1, 0, 0]))
    heard = listener.hear()
    assert heard is not None
    assert list(heard.values())[:3] == [-0.25, 0.5, 0.75]


def test_a_choice_that_does_not_exist_sends_nothing(make: Make, listener: Listener) -> None:
    actuator = make()
    with pytest.raises(ValueError, match="a choice from each"):
        actuator.act(np.array([9, 0, 0, 0, 0]))
    assert listener.hear(0.05) is None


class Broken:
    """A socket that takes nothing."""

    def __init__(self, error: OSError) -> None:
        self.error = error
        self.tried = 0

    def sendto(self, data: bytes, address: object) -> int:
        self.tried += 1
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENETUNREACH, "away"), BlockingIOError(), ConnectionRefusedError()], ids=repr
)
def test_a_network_that_is_away_is_no_error_and_the_watchdog_hears_of_every_step(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    actuator, broken, signs = make(), Broken(error), list[bytes]()
    with monkeypatch.context() as away:
        away.setattr(actuator, "_socket", broken)
        away.setattr(actuator, "_sign_of_life", signs.append)
        for _ in range(3):
            actuator.act(FORWARD)
        actuator.neutral()
    assert broken.tried == 4 * len(NEUTRAL)
    assert signs == [ACTING] * 3 + [RESTING]


def test_a_watchdog_that_cannot_be_started_again_is_tried_later(
    make: Make, listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    actuator = make(clock=clock)
    actuator._watchdog.kill()
    actuator._watchdog.wait(5)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as short:
        short.setattr(vrchat_osc, "start_watchdog", fail)
        for clock.now in (1.0, 1.1, 2.1):
            actuator.act(FORWARD)
            actuator.neutral()
        assert caplog.text.count("cannot be restarted") == 2
    clock.now = 4.0
    actuator.act(FORWARD)
    assert actuator._watchdog.poll() is None


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 300])
def test_a_host_that_cannot_be_resolved_is_a_configuration_error(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, look_up = list[Any](), socket.getaddrinfo

    def ask_nobody(name: str, *arguments: Any, **options: Any) -> Any:
        asked.append(name)
        if name.endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return look_up(name, *arguments, **options)  # which no name server takes for a name

    monkeypatch.setattr(socket, "getaddrinfo", ask_nobody)
    with pytest.raises(ConfigurationError, match=r"inference\.environment\.actuator\.host"):
        VRChatOSCDiscreteActuator(host=host, resolve_patience=0.0)
    assert asked == [host], "once: it was to have no patience"


def test_what_cannot_be_sent_is_counted_and_said_once(
    make: Make, listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    actuator = make()
    with monkeypatch.context() as away:
        away.setattr(actuator, "_socket", Broken(PermissionError(errno.EPERM, "a firewall")))
        for _ in range(3):
            actuator.act(FORWARD)
    assert actuator.statistics() == {
        "osc_target": f"127.0.0.1:{listener.port}", "osc_unsent": 3 * len(NEUTRAL)
    }  # fmt: skip
    assert caplog.text.count("OSC cannot be sent to") == 1
    actuator.act(FORWARD)
    assert listener.hear() == FORWARD_VALUES
    assert actuator.statistics()["osc_unsent"] == 3 * len(NEUTRAL)


def test_a_host_that_has_another_address_is_followed_and_so_is_its_watchdog(
    make: Make,
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    poll_for: PollFor,
) -> None:
    entries, looked = {"now": ["127.0.0.9", "127.0.0.1"]}, []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        looked.append(host)
        if host != "avatar.lan":
            return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (host, port))]
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (address, port)) for address in entries["now"]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(target, "LOOK_UP_EVERY_S", 0.02)
    actuator = VRChatOSCDiscreteActuator(host="avatar.lan", port=listener.port, max_silence=0.3)
    try:
        assert actuator.statistics()["osc_target"] == f"127.0.0.9:{listener.port}"
        entries["now"].reverse()
        since = len(looked)
        poll_for(lambda: len(looked) > since + 1)
        assert actuator._target.address[0] == "127.0.0.9", "it is still one of the host's"
        entries["now"] = ["127.0.0.1"]
        poll_for(lambda: actuator._target.address[0] == "127.0.0.1")
        actuator.act(FORWARD)
        assert listener.hear() == FORWARD_VALUES
        assert "avatar.lan is at 127.0.0.1 now" in caplog.text
        assert listener.hear() == NEUTRAL, "the watchdog's, after a silence"
        entries["now"] = []
        time.sleep(0.1)
        actuator.act(FORWARD)
        assert actuator.statistics()["osc_target"] == f"127.0.0.1:{listener.port}"
    finally:
        actuator.close()


def test_what_listens_everywhere_is_sent_to_on_this_machine() -> None:
    assert resolve("0.0.0.0", 9000, 0.0) == (socket.AF_INET, ("127.0.0.1", 9000))


def test_after_a_silence_in_which_the_watchdog_has_let_go_axes_begin_at_rest(
    make: Make, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    actuator = make(lag=0.2, max_silence=0.5, clock=clock)
    monkeypatch.setattr(actuator, "_sign_of_life", lambda sign: None)  # its silences are real ones
    for clock.now in (0.1, 0.2, 2.0, 2.1):
        actuator.act(FORWARD)
    heard = [listener.hear() for _ in range(4)]
    values = [each["/input/Vertical"] for each in heard if each]
    assert values == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(-1.0), 0.0, 1 - math.exp(-0.5)], abs=1e-6)


def test_a_name_is_not_looked_up_by_the_acting_loop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, look_up = list[Any](), socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a[0]) or look_up(*a, **k))
    actuator = make(host="localhost")
    for _ in range(10):
        actuator.act(FORWARD)
    actuator.close()
    assert asked == ["localhost"]


@pytest.mark.parametrize(
    "options",
    [{"speeds": (1.0, 1.0)}, {"speeds": (0.0, 1.0, 1.0)}, {"speeds": (1.0, 1.0, 1.1)}, {"speeds": (1.0, math.nan, 1.0)},
     {"max_silence": 0.0}, {"max_silence": math.inf}, {"max_silence": math.nan}, {"lag": -0.1}, {"lag": math.nan}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_configuration_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="actuator"):
        VRChatOSCDiscreteActuator(**options)


def test_of_a_name_with_both_kinds_of_address_ipv4_is_sent_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As localhost has on most machines; VRChat listens there."""
    six = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", 9000, 0, 0))
    four = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 9000))
    found = [six, four]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert resolve("localhost", 9000, 0.0) == (socket.AF_INET, ("127.0.0.1", 9000))
    found.remove(four)
    assert resolve("localhost", 9000, 0.0) == (socket.AF_INET6, ("::1", 9000))


@pytest.mark.parametrize("port", [0, -1, 65_536, 1.5, True, "abc", None])
def test_a_port_that_is_none_is_a_configuration_error(port: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"actuator\.port="):
        VRChatOSCDiscreteActuator(port=port)


@pytest.mark.parametrize("host", ["", None, 7])
def test_a_host_that_is_none_is_a_configuration_error(host: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"actuator\.host="):
        VRChatOSCDiscreteActuator(host=host)
