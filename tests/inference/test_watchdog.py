"""The watchdog as what it is, a process, against a real socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from listening import Listener

from ami_inference.actuators import watchdog
from ami_inference.actuators.controls import NEUTRAL
from ami_inference.actuators.vrchat_osc import end_watchdog, start_watchdog
from ami_inference.actuators.watchdog import ACTING, LAST_WORDS, RESTING

Start = Callable[[float], subprocess.Popen[bytes]]


@pytest.fixture
def start(listener: Listener) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(max_silence_s: float) -> subprocess.Popen[bytes]:
        started.append(start_watchdog(("127.0.0.1", listener.port), max_silence_s))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait(5)
        assert process.stdin is not None
        process.stdin.close()


def sign(process: subprocess.Popen[bytes], life: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(life)


def close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def test_the_parent_s_end_lets_go_of_everything_and_ends_the_watchdog(start: Start, listener: Listener) -> None:
    process = start(60.0)
    sign(process, ACTING)
    close_input(process)
    for _ in range(3):  # a datagram may get lost
        assert listener.hear() == NEUTRAL
    assert listener.hear(0.1) is None
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    "told", [b"", b"127.0.0.1 9", b"127.0.0.1 9000 0.5\n", b"127.0.0.1 9000 0.5\n\x05\x00ab"], ids=repr
)
def test_a_parent_that_dies_before_it_has_told_all_ends_it_in_silence(told: bytes) -> None:
    command = [sys.executable, watchdog.__file__]
    ended = subprocess.run(command, input=told, capture_output=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == (b"", b"")


def test_it_does_nothing_before_the_first_sign_of_life(start: Start, listener: Listener) -> None:
    start(0.05)
    assert listener.hear(0.5) is None


def test_silence_while_acting_lets_go_some_times_for_a_datagram_may_get_lost(start: Start, listener: Listener) -> None:
    process = start(0.2)
    for _ in range(2):
        sign(process, ACTING)
        for _ in range(LAST_WORDS):
            assert listener.hear() == NEUTRAL
        assert listener.hear(0.6) is None


def test_who_acts_again_is_left_alone(start: Start, listener: Listener) -> None:
    process = start(2.0)
    sign(process, ACTING)
    assert listener.hear() == NEUTRAL
    sign(process, RESTING)
    further = 0
    while listener.hear(2.5):
        further += 1
    assert further < LAST_WORDS - 1, "one may be said before the sign is heard"


def longest_silence_s(process: subprocess.Popen[bytes]) -> float:
    """Act for longer than one may be silent, and Python needs to start; return the longest time without a sign."""
    signed_at, longest_s = time.monotonic(), 0.0
    for life in [ACTING] * 30 + [RESTING]:
        sign(process, life)
        now = time.monotonic()
        signed_at, longest_s = now, max(longest_s, now - signed_at)
        time.sleep(0.1)
    return longest_s


def test_signs_of_life_keep_it_quiet(start: Start, listener: Listener) -> None:
    process = start(1.0)
    for _ in range(10):
        if longest_silence_s(process) < 0.5 and listener.hear(0.5) is None:
            break
        while listener.hear(1.0):  # a silence of this process's own, or of the watchdog's
            pass
    else:
        raise AssertionError("the signs were held up again and again")


def test_silence_at_rest_means_nothing(start: Start, listener: Listener) -> None:
    process = start(0.1)
    sign(process, ACTING + RESTING)
    assert listener.hear(0.5) is None


def test_only_the_last_sign_counts(start: Start, listener: Listener) -> None:
    process = start(0.1)
    sign(process, RESTING + ACTING)
    assert listener.hear() == NEUTRAL


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_outlives_the_signals_that_end_its_parent(start: Start, listener: Listener, number: signal.Signals) -> None:
    process = start(0.2)
    sign(process, ACTING)
    for _ in range(LAST_WORDS):  # it has read its settings and ignores signals by now
        assert listener.hear() == NEUTRAL
    process.send_signal(number)
    assert listener.hear(0.1) is None
    assert process.poll() is None
    close_input(process)
    assert listener.hear() == NEUTRAL


@pytest.mark.skipif(os.name == "nt", reason="POSIX sessions")
def test_it_is_no_part_of_its_parent_s_session(start: Start) -> None:
    process = start(60.0)
    assert os.getsid(process.pid) != os.getsid(0)


def test_ending_it_twice_is_harmless(start: Start, listener: Listener) -> None:
    process = start(60.0)
    end_watchdog(process)
    end_watchdog(process)
    assert process.wait(30) == 0
    assert listener.hear() == NEUTRAL
