"""Whatever happens to trainer, controller, body or link: every record of a living body reaches every buffer exactly
once, or is counted as lost. Kills in the middle of everything: test_kills.py."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from auditor import Auditor
from fault_proxy import FaultProxy
from flowing import BUFFER, FAST, INTERVAL_S, Flowing
from footprint import taken_by
from guest_body import GuestBody
from processes import System, free_base_port, poll_for

from ami_shared import limits

MakeSystem = Callable[..., System]


@pytest.fixture
def flowing(make_flowing: Callable[..., Flowing], in_memory: bool) -> Flowing:
    """Records come out of the body's memory, or over the wire."""
    made = make_flowing(*FAST)
    assert (made.told()["records_from_memory"]["image_vae"] > 0) == in_memory
    return made


def test_a_stopped_trainer_fetches_what_it_slept_through(flowing: Flowing) -> None:
    flowing.trainer.signal(signal.SIGSTOP)
    time.sleep(limits.LINK_TIMEOUT + 3.0)
    slept = flowing.published
    flowing.trainer.signal(signal.SIGCONT)
    told = flowing.settled(beyond=slept)
    assert told["lost"]["image_vae"] == 0
    assert told["missed"]["image_vae"] > 0, "its link was cut meanwhile"
    flowing.unharmed()
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])


@pytest.mark.slow
def test_a_trainer_ten_times_slower_than_the_stream_loses_nothing(
    make_system: MakeSystem, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "slow_parts"), prepend=os.pathsep)
    flowing = Flowing(make_system(*FAST), "trainers.image_vae._target_=slow_trainer.SlowTrainer")
    try:
        begun = flowing.published
        time.sleep(3.0)
        flowing.system.command("pause")
        assert flowing.told()["behind"]["image_vae"] > 200, "it cannot keep up"
        poll_for(lambda: not flowing.told()["behind"]["image_vae"], 240, "it has taken all")
        told = flowing.settled(beyond=begun)
        assert (told["records_from_memory"]["image_vae"] > 0) == in_memory
        assert told["lost"]["image_vae"] == 0
        flowing.unharmed()
        assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])
    finally:
        flowing.close()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["image_vae", "controller", "body"])
def test_whoever_stands_still_for_a_while_costs_nobody_a_record(
    flowing: Flowing, victim: str, chance: random.Random
) -> None:
    """Once for half a minute, and for shorter times, some of them too short to be noticed."""
    stopped_s = 0.0
    for seconds in (30.0, chance.uniform(0.2, 2.5), chance.uniform(3.5, 9.0)):
        flowing.runs_on(chance.uniform(0.0, 0.5))
        before = flowing.published
        flowing.processes[victim].signal(signal.SIGSTOP)
        time.sleep(seconds)
        flowing.processes[victim].signal(signal.SIGCONT)
        flowing.system.wait_running()
        stopped_s += seconds
        if victim != "body":
            acted = before + int(0.8 * seconds / INTERVAL_S)
            poll_for(lambda n=acted: flowing.published > n, 20, "the body has acted all the while")
    told = flowing.settled(beyond=flowing.published)
    assert told["lost"]["image_vae"] == 0
    flowing.unharmed(stopped_s=stopped_s if victim == "body" else 0.0)
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])


def test_a_killed_controller_costs_no_record(flowing: Flowing) -> None:
    before = flowing.published
    flowing.controller.kill()
    time.sleep(3.0)
    flowing.start("controller")
    flowing.system.wait_running()
    told = flowing.settled(beyond=before + 300)
    assert told["lost"]["image_vae"] == 0
    flowing.unharmed()
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])


def test_a_killed_trainer_has_the_past_back_from_the_ring(flowing: Flowing) -> None:
    before = flowing.published
    flowing.trainer.kill()
    published = poll_for(lambda: (now := flowing.published) > before + 100 and now, what="records that nobody took")
    flowing.start("image_vae")
    told = flowing.settled(beyond=published)
    assert told["lost"]["image_vae"] == 0
    flowing.unharmed()
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])


def test_a_killed_body_begins_a_new_life_whose_records_all_arrive(flowing: Flowing) -> None:
    before = flowing.received
    flowing.restart("body")
    poll_for(lambda: flowing.published > 200)
    published = flowing.all_arrived()["published"]
    # What the trainer told last may be older than what the body did.
    poll_for(lambda: flowing.received >= before + published, what="what the first life left, and the second")
    assert len(flowing.lives) == 2
    flowing.unharmed()
    assert flowing.frames_in_buffer() >= min(BUFFER, before + published)


@pytest.mark.slow
def test_what_left_the_ring_is_counted_and_said(make_flowing: Callable[..., Flowing]) -> None:
    flowing = make_flowing(*FAST, "inference.retained_mb=1")
    flowing.trainer.signal(signal.SIGSTOP)
    time.sleep(limits.LINK_TIMEOUT + 3.0)
    slept = flowing.published
    flowing.trainer.signal(signal.SIGCONT)
    told = flowing.settled(beyond=slept)
    assert told["lost"]["image_vae"] > 50
    assert f"image_vae lost {told['lost']['image_vae']} records of body" in flowing.system.ami("status").stdout


@pytest.fixture(params=["image_vae", "body"])
def proxied(request: pytest.FixtureRequest, make_system: MakeSystem) -> Iterator[tuple[Flowing, FaultProxy, str]]:
    """One service alone reaches the hub through a proxy that can misbehave."""
    system = make_system(*FAST)
    base = free_base_port(5, beside=range(system.hub.port, system.hub.port + 8))
    proxy = FaultProxy(range(base, base + 5), range(system.hub.port, system.hub.port + 5))
    flowing = Flowing(system, f"hub=127.0.0.1:{base}", only=request.param)
    yield flowing, proxy, request.param
    flowing.close()
    proxy.close()


@pytest.mark.parametrize("fault", ["frozen", "cut"])
def test_a_link_that_fails_is_healed(proxied: tuple[Flowing, FaultProxy, str], fault: str) -> None:
    flowing, proxy, behind_it = proxied
    if fault == "frozen":
        proxy.freeze()
        time.sleep(limits.LINK_TIMEOUT + 3.0)
        proxy.thaw()
    else:
        proxy.cut(3.0)
        time.sleep(3.0)
    told = flowing.settled(beyond=flowing.published)
    assert told["lost"]["image_vae"] == 0
    assert all(link["lost"] > 0 for link in flowing.system.service(behind_it)["links"].values())
    assert told["missed"]["image_vae"] > 0 or behind_it == "body", "which sends on what waits in its queue"
    flowing.unharmed()
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])


def trainer_comes_and_goes(flowing: Flowing) -> None:
    guest = Auditor(flowing.system.overrides, "guest", history=50)
    poll_for(lambda: guest.records > 10, what="it takes part in the stream")
    guest.close()
    assert (guest.out_of_order, guest.unexplained) == (0, 0)


def body_comes_and_goes(flowing: Flowing) -> None:
    guest = GuestBody(flowing.system.overrides)
    poll_for(lambda: flowing.system.service("guest"), what="it is a member")
    before = flowing.of_guest("received")
    guest.publish(20)
    poll_for(lambda: flowing.of_guest("received") == before + 20, what="all records of its life")
    assert flowing.of_guest("lost") == 0
    guest.close()


@pytest.mark.slow
@pytest.mark.parametrize("come_and_go", [trainer_comes_and_goes, body_comes_and_goes], ids=["trainer", "body"])
def test_members_that_come_and_go_many_times_leave_nothing_behind(
    flowing: Flowing, come_and_go: Callable[[Flowing], None]
) -> None:
    come_and_go(flowing)
    before = {name: taken_by(process.pid) for name, process in flowing.processes.items()}
    for _ in range(100):
        come_and_go(flowing)
    for name, process in flowing.processes.items():
        poll_for(lambda n=name, p=process: taken_by(p.pid)["descriptors"] <= before[n]["descriptors"] + 4, what=name)
        assert taken_by(process.pid)["threads"] <= before[name]["threads"] + 1
    told = flowing.settled(beyond=flowing.published)
    assert told["lost"]["image_vae"] == 0
    flowing.unharmed()
