"""kill -9 of each part in the middle of streaming, of fetching and of publishing: nobody misses anything.

Every kill is at a random moment, whose seed is printed.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest
from flowing import BUFFER, FAST, Flowing
from processes import poll_for

from ami_shared import limits

pytestmark = pytest.mark.slow
KILLS = 3
GRID_POINTS = 300  # of a hundred a second: starting a process on two cores costs some


def stream_on(flowing: Flowing, chance: random.Random) -> None:
    before = flowing.published
    poll_for(lambda: flowing.published > before, what="records flow")
    time.sleep(chance.uniform(0.0, 0.5))


def fetch(flowing: Flowing, chance: random.Random) -> None:
    """Return while the trainer fetches what it slept through, its link cut."""
    flowing.trainer.signal(signal.SIGSTOP)
    time.sleep(limits.LINK_TIMEOUT + 2.0)
    flowing.trainer.signal(signal.SIGCONT)
    time.sleep(chance.uniform(0.0, 0.4))


def publish(flowing: Flowing, chance: random.Random) -> None:
    """Return while snapshots are published, fifty a second."""
    version = flowing.system.model()["version"]
    poll_for(lambda: flowing.system.model()["version"] > version + 5, 40, "snapshots flow")
    time.sleep(chance.uniform(0.0, 0.1))


@pytest.mark.parametrize("victim", ["controller", "image_vae", "body"])
@pytest.mark.parametrize("moment", [stream_on, fetch, publish], ids=lambda moment: moment.__name__)
def test_whoever_is_killed_in_the_middle_costs_nobody_a_record(
    make_flowing: Callable[..., Flowing],
    moment: Callable[[Flowing, random.Random], None],
    victim: str,
    in_memory: bool,
    chance: random.Random,
) -> None:
    often = ("trainers.image_vae.service.publish_interval=0.02", "models=small") if moment is publish else ()
    flowing = make_flowing(*FAST, *often)
    for _ in range(KILLS):
        used = flowing.system.model()["used"].get("body", 0)
        moment(flowing, chance)
        flowing.restart(victim)
        poll_for(lambda u=used: flowing.system.model()["used"].get("body", 0) >= u, what="versions never go back")

    def brought_from_memory() -> bool:
        (body,) = (service for service in flowing.system.status()["services"] if service["name"] == "body")
        return bool(body["snapshots_from_memory"] > 0)

    if in_memory:  # none is published once the system is paused
        poll_for(brought_from_memory, what="a snapshot in memory, after what the controller gave it at its start")
    told = flowing.all_arrived()
    assert len(flowing.auditor.lives) == (1 + KILLS if victim == "body" else 1)
    if victim != "body":
        assert told["lost"]["image_vae"] == 0, "the trainer misses nothing of a body that lives"
    status = flowing.system.status()
    assert all(not service.get("wire_errors") for service in status["services"]), status["services"]
    assert status["hub"]["snapshots_refused"] == 0
    assert brought_from_memory() == in_memory
    flowing.unharmed(GRID_POINTS)
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])
