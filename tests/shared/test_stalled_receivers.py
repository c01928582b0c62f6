"""A receiver whose queue is full stops reading. libzmq 4.3.5 aborts the process when the link fails meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq

from ami_shared import limits
from ami_shared.bus import EXPERIENCE, HubAddress, Port, make_socket

Context = zmq.Context[zmq.Socket[bytes]]

SLEEPER = """
import dataclasses, sys, zmq
from ami_shared.bus import EXPERIENCE, HubAddress, Port, dial
options = dataclasses.replace(EXPERIENCE, subscriptions=(b"",))
reader = dial(zmq.Context(), zmq.SUB, HubAddress.parse(sys.argv[1]), Port.EXPERIENCE_OUT, options)
while reader.recv() != b"end":
    pass
"""


@contextmanager
def a_subscriber(hub: HubAddress) -> Iterator[subprocess.Popen[bytes]]:
    """A subscriber in a process of its own, which is ended whatever happens."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER, str(hub)], stderr=subprocess.PIPE) as sleeper:
        try:
            yield sleeper
        finally:
            sleeper.kill()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_whoever_slept_through_many_small_messages_and_a_cut_lives_on(
    context: Context, hub: HubAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINK_HEARTBEAT", 0.02)
    monkeypatch.setattr(limits, "LINK_TIMEOUT", 0.5)
    publisher = make_socket(context, zmq.XPUB, bind=hub.endpoint(Port.EXPERIENCE_OUT), options=EXPERIENCE)
    with a_subscriber(hub) as sleeper:
        assert publisher.poll(20_000), "it has subscribed"
        os.kill(sleeper.pid, signal.SIGSTOP)
        until = time.monotonic() + 2 * limits.LINK_TIMEOUT
        while time.monotonic() < until:
            publisher.send(bytes(100))
            time.sleep(0.0002)
        os.kill(sleeper.pid, signal.SIGCONT)
        deadline = time.monotonic() + 20.0
        while sleeper.poll() is None and time.monotonic() < deadline:
            publisher.send(b"end")
            time.sleep(0.05)
        sleeper.kill()
        assert sleeper.returncode == 0, sleeper.stderr and sleeper.stderr.read().decode()
