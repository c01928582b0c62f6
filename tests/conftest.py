"""What tests of several packages need: polling, free ports, the repository's configuration."""

from __future__ import annotations

import itertools
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, settings

from ami_shared.bus import HubAddress

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores already

settings.register_profile("ami", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ami")

PollFor = Callable[..., Any]


@pytest.fixture
def poll_for() -> PollFor:
    """Return a function that waits until a condition holds, and returns its value."""

    def poll(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.01)
        if value := condition():  # this process may have slept past the deadline
            return value
        raise AssertionError(f"did not come to be within {timeout_s:g} s")

    return poll


@pytest.fixture
def chance() -> random.Random:
    """Return chance, whose seed is printed."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def hub() -> HubAddress:
    """Return a hub's address on the loopback interface whose five ports are free, and no other worker's."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 15_000 + 2_000 * (worker % 8)  # below the ports that the system hands out
    for _ in range(400):
        base = first + 5 * next(_TURNS)
        if all(_can_bind(base + offset) for offset in range(5)):
            return HubAddress("127.0.0.1", base)
    raise AssertionError("no five free ports in a row")


_TURNS = (turn % 400 for turn in itertools.count(os.getpid()))  # elsewhere than those of another run


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class KeepingContext(zmq.Context[zmq.Socket[bytes]]):
    """Holds its sockets, so that none is collected, with a warning, before it is closed."""

    kept: list[zmq.Socket[bytes]] = []  # noqa: RUF012

    def socket(self, *arguments: Any, **options: Any) -> zmq.Socket[bytes]:
        made = super().socket(*arguments, **options)
        self.kept.append(made)
        return made


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """Return a ZeroMQ context that is destroyed after the test, with all its sockets."""
    made = KeepingContext()
    made.kept = []
    yield made
    for kept in made.kept:
        kept.close(linger=0)
    made.destroy(linger=0)


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the configuration come from the checkout, whatever the shell says."""
    folder = Path(__file__).parents[1] / "configs"
    monkeypatch.setenv("AMI_CONFIG_DIR", str(folder))
    monkeypatch.delenv("AMI_HUB", raising=False)
    monkeypatch.delenv("AMI_JOIN", raising=False)
    return folder


@pytest.fixture(autouse=True)
def same_switch_interval() -> Iterator[None]:
    """The interaction loop shortens the interpreter's switch interval for its whole process."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)
