"""kill -9 of each part in the middle of streaming, of fetching and of publishing: nobody misses anything.

Every kill is at a random moment, whose seed is printed.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

import pytest
import zmq
from flowing import BUFFER, FAST, Flowing
from processes import poll_for

from ami_shared import limits, wire
from ami_shared.bus import EXPERIENCE, PARAMETERS, Port
from ami_shared.experience import fetched_topic
from ami_shared.snapshots import notice_topic, topic

pytestmark = pytest.mark.slow
KILLS = 3
LARGE_AND_OFTEN = (  # more than SNAPSHOT_PART_BYTES: sent in parts
    "trainers.image_vae.service.publish_interval=0.5",
    "models.image_encoder.hidden=8192",
)
GRID_POINTS = 300  # of a hundred a second: starting a process on two cores costs some


def stream_on(flowing: Flowing, chance: random.Random) -> None:
    flowing.runs_on(chance.uniform(0.0, 0.5))


def fetch(flowing: Flowing, chance: random.Random) -> None:
    """Return while the trainer fetches what it slept through: after the first message of the answer, which has many."""
    flowing.trainer.signal(signal.SIGSTOP)
    time.sleep(limits.LINK_TIMEOUT + 2.0)
    with flowing.system.subscribed(Port.EXPERIENCE_OUT, EXPERIENCE, fetched_topic("image_vae")) as stream:
        time.sleep(0.3)  # the hub has heard of it
        flowing.trainer.signal(signal.SIGCONT)
        assert stream.poll(30_000), "an answer"
    time.sleep(chance.uniform(0.0, 0.01))


def publish(flowing: Flowing, chance: random.Random) -> None:
    """Return while a snapshot is published, one of many: after its notice, or after the first of its parts."""
    model = flowing.system.model()["name"]
    shared = flowing.system.service("body")["snapshots_from_memory"] > 0
    of_model = notice_topic(model) if shared else topic(model)
    with flowing.system.subscribed(Port.PARAMETERS_OUT, PARAMETERS, of_model) as stream:
        for _ in range(chance.randrange(3, 9)):
            assert stream.poll(60_000), "a snapshot"
            *_, last = iter(lambda: receive(stream), None)
        while not shared and wire.decode(last).get("part", list)[0]:
            assert stream.poll(60_000), "the first part of a snapshot"
            last = stream.recv_multipart()
    time.sleep(chance.uniform(0.0, 0.01))


def receive(stream: zmq.Socket[bytes]) -> list[bytes] | None:
    return stream.recv_multipart() if stream.poll(0) else None


@pytest.mark.parametrize("victim", ["controller", "image_vae", "body"])
@pytest.mark.parametrize("moment", [stream_on, fetch, publish], ids=lambda moment: moment.__name__)
def test_whoever_is_killed_in_the_middle_costs_nobody_a_record(
    make_flowing: Callable[..., Flowing],
    moment: Callable[[Flowing, random.Random], None],
    victim: str,
    in_memory: bool,
    chance: random.Random,
) -> None:
    often = LARGE_AND_OFTEN if moment is publish else ()
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
    assert len(flowing.lives) == (1 + KILLS if victim == "body" else 1)
    if victim != "body":
        assert told["lost"]["image_vae"] == 0, "the trainer misses nothing of a body that lives"
    status = flowing.system.status()
    assert all(not service.get("wire_errors") for service in status["services"]), status["services"]
    assert status["hub"]["snapshots_refused"] == 0
    assert brought_from_memory() == in_memory
    flowing.unharmed(GRID_POINTS)
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])
