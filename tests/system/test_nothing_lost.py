"""Whatever happens to trainer, controller, body or link: every record of a living body reaches every buffer exactly
once, or is counted as lost. Kills in the middle of everything: test_kills.py."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest
from auditor import Auditor
from fault_proxy import FaultProxy
from flowing import BUFFER, FAST, Flowing
from footprint import taken_by
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
def test_a_trainer_ten_times_slower_than_the_stream_loses_nothing(flowing: Flowing) -> None:
    for _ in range(20):
        flowing.trainer.signal(signal.SIGSTOP)
        time.sleep(0.45)
        flowing.trainer.signal(signal.SIGCONT)
        time.sleep(0.05)
    assert flowing.settled(beyond=flowing.published)["lost"]["image_vae"] == 0
    flowing.unharmed()


@pytest.mark.slow
def test_a_trainer_that_sleeps_for_half_a_minute_fetches_all_of_it(flowing: Flowing) -> None:
    flowing.trainer.signal(signal.SIGSTOP)
    time.sleep(30.0)
    slept = flowing.published
    flowing.trainer.signal(signal.SIGCONT)
    told = flowing.settled(beyond=slept)
    assert told["lost"]["image_vae"] == 0
    flowing.unharmed()
    assert flowing.frames_in_buffer() >= BUFFER


@pytest.mark.slow
def test_a_stopped_controller_costs_no_record_and_holds_nobody(flowing: Flowing) -> None:
    before = flowing.published
    flowing.controller.signal(signal.SIGSTOP)
    time.sleep(30.0)
    flowing.controller.signal(signal.SIGCONT)
    flowing.system.wait_running()
    assert flowing.settled(beyond=before + 2_700)["lost"]["image_vae"] == 0
    flowing.unharmed()


@pytest.mark.slow
def test_a_stopped_body_goes_on_with_its_life_and_nothing_is_missing(flowing: Flowing) -> None:
    flowing.body.signal(signal.SIGSTOP)
    flowing.system.wait_for_state("body", "lost")
    time.sleep(30.0)
    before = flowing.received
    flowing.body.signal(signal.SIGCONT)
    flowing.system.wait_running()
    assert flowing.settled(beyond=before + 50)["lost"]["image_vae"] == 0


def test_a_killed_controller_costs_no_record(flowing: Flowing) -> None:
    before = flowing.published
    flowing.controller.kill()
    time.sleep(3.0)
    flowing.start("controller")
    flowing.system.wait_running()
    assert flowing.settled(beyond=before + 300)["lost"]["image_vae"] == 0
    flowing.unharmed()


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
    assert len(flowing.auditor.lives) == 2
    flowing.unharmed()


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


@pytest.fixture
def proxied(make_system: MakeSystem) -> Iterator[tuple[Flowing, FaultProxy]]:
    """The trainer alone reaches the hub through a proxy that can misbehave."""
    system = make_system(*FAST)
    base = free_base_port(5, beside=range(system.hub.port, system.hub.port + 8))
    proxy = FaultProxy(range(base, base + 5), range(system.hub.port, system.hub.port + 5))
    flowing = Flowing(system, f"hub=127.0.0.1:{base}")
    yield flowing, proxy
    flowing.close()
    proxy.close()


@pytest.mark.parametrize("fault", ["frozen", "cut"])
def test_a_link_that_fails_is_healed(proxied: tuple[Flowing, FaultProxy], fault: str) -> None:
    flowing, proxy = proxied
    if fault == "frozen":
        proxy.freeze()
        time.sleep(limits.LINK_TIMEOUT + 3.0)
        proxy.thaw()
    else:
        proxy.cut(3.0)
        time.sleep(3.0)
    told = flowing.settled(beyond=flowing.published)
    assert told["lost"]["image_vae"] == 0
    assert told["missed"]["image_vae"] > 0
    flowing.unharmed()
    assert flowing.frames_in_buffer() >= min(BUFFER, told["published"])


@pytest.mark.slow
def test_members_that_come_and_go_many_times_leave_nothing_behind(flowing: Flowing) -> None:
    def come_and_go() -> None:
        guest = Auditor(flowing.system.overrides, "guest", history=50)
        poll_for(lambda: guest.records > 10, what="it takes part in the stream")
        guest.close()
        assert (guest.out_of_order, guest.unexplained) == (0, 0)

    come_and_go()
    before = {name: taken_by(process.pid) for name, process in flowing.processes.items()}
    for _ in range(100):
        come_and_go()
    for name, process in flowing.processes.items():
        poll_for(lambda n=name, p=process: taken_by(p.pid)["descriptors"] <= before[n]["descriptors"] + 4, what=name)
        assert taken_by(process.pid)["threads"] <= before[name]["threads"] + 1
    assert flowing.settled(beyond=flowing.published)["lost"]["image_vae"] == 0
    flowing.unharmed()
