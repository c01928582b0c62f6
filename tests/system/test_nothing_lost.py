"""Whatever happens to trainer, controller, body or link: every record of a living body reaches every buffer exactly
once, or is counted as lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from processes import Process, System, free_base_port, poll_for

from ami_shared import limits
from ami_shared.errors import AmiError
from capabilities import sharing_memory

MakeSystem = Callable[..., System]
FAST = ("experiment=noise", "inference.interval=0.01")
BUFFER = 2_048
NOTHING: dict[str, Any] = {"published": 0, **{key: {"image_vae": 0} for key in ("received", "lost", "behind")}}


def seeded() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


class Flowing:
    """Controller, body and trainer at a hundred records a second; the trainer's buffer holds all of the past."""

    def __init__(self, system: System, *overrides: str) -> None:
        self.system = system
        self.controller = system.start("controller")
        self.trainer = system.start("image_vae", *overrides)
        system.wait_for_state("image_vae", "running", 40)  # it hears the body from birth
        self.body = system.start("body")
        system.wait_running()
        poll_for(lambda: self.received > 50, 10, "records flow")

    def told(self) -> dict[str, Any]:
        try:
            streams: list[dict[str, Any]] = self.system.status()["experience"]
        except AmiError:
            return NOTHING
        return {**NOTHING, **streams[0]} if streams and streams[0]["received"] else NOTHING

    @property
    def published(self) -> int:
        return int(self.told()["published"])

    @property
    def received(self) -> int:
        return int(self.told()["received"]["image_vae"])

    def settled(self, beyond: int) -> dict[str, Any]:
        """Wait until the trainer is past `beyond`, pause, and return the status when all that was published is told."""

        def reached(told: dict[str, Any]) -> int:
            return int(told["received"]["image_vae"] + told["lost"]["image_vae"])

        poll_for(lambda: reached(self.told()) > beyond, 20, "the trainer caught up")
        assert self.system.ami("pause").returncode == 0
        told = poll_for(lambda: (t := self.told())["published"] == reached(t) > beyond and t, 10, "all arrived")
        assert told["overflowed"] == 0
        return told  # type: ignore[no-any-return]


@pytest.fixture(params=[pytest.param(True, marks=sharing_memory, id="memory"), pytest.param(False, id="wire")])
def flowing(make_system: MakeSystem, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flowing:
    """Records come out of the body's memory, or over the wire."""
    if not request.param:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "without_shared_memory"))
    made = Flowing(make_system(*FAST))
    assert (made.told()["records_from_memory"]["image_vae"] > 0) == request.param
    return made


def test_a_stopped_trainer_fetches_what_it_slept_through(flowing: Flowing) -> None:
    flowing.trainer.signal(signal.SIGSTOP)
    time.sleep(limits.LINK_TIMEOUT + 3.0)
    slept = flowing.published
    flowing.trainer.signal(signal.SIGCONT)
    told = flowing.settled(beyond=slept)
    assert told["lost"]["image_vae"] == 0
    assert told["missed"]["image_vae"] > 0, "its link was cut meanwhile"


@pytest.mark.slow
def test_a_trainer_ten_times_slower_than_the_stream_loses_nothing(flowing: Flowing) -> None:
    for _ in range(20):
        flowing.trainer.signal(signal.SIGSTOP)
        time.sleep(0.45)
        flowing.trainer.signal(signal.SIGCONT)
        time.sleep(0.05)
    assert flowing.settled(beyond=flowing.published)["lost"]["image_vae"] == 0


@pytest.mark.slow
def test_a_trainer_that_sleeps_for_half_a_minute_fetches_all_of_it(flowing: Flowing) -> None:
    flowing.trainer.signal(signal.SIGSTOP)
    time.sleep(30.0)
    slept = flowing.published
    flowing.trainer.signal(signal.SIGCONT)
    assert flowing.settled(beyond=slept)["lost"]["image_vae"] == 0


@pytest.mark.slow
def test_a_stopped_controller_costs_no_record_and_holds_nobody(flowing: Flowing) -> None:
    before, skipped = flowing.published, flowing.system.service("body")["skipped_ticks"]
    flowing.controller.signal(signal.SIGSTOP)
    time.sleep(30.0)
    flowing.controller.signal(signal.SIGCONT)
    flowing.system.wait_running(15.0)
    assert flowing.settled(beyond=before + 2_700)["lost"]["image_vae"] == 0
    assert flowing.system.service("body")["skipped_ticks"] < skipped + 150, "acting did not wait"


@pytest.mark.slow
def test_a_stopped_body_goes_on_with_its_life_and_nothing_is_missing(flowing: Flowing) -> None:
    flowing.body.signal(signal.SIGSTOP)
    flowing.system.wait_for_state("body", "lost")
    time.sleep(30.0)
    before = flowing.received
    flowing.body.signal(signal.SIGCONT)
    flowing.system.wait_running(15.0)
    assert flowing.settled(beyond=before + 50)["lost"]["image_vae"] == 0


def test_a_killed_controller_costs_no_record(flowing: Flowing) -> None:
    before = flowing.published
    flowing.controller.kill()
    time.sleep(3.0)
    flowing.system.start("controller")
    flowing.system.wait_running(15.0)
    assert flowing.settled(beyond=before + 300)["lost"]["image_vae"] == 0


def test_a_killed_trainer_has_the_past_back_from_the_ring(flowing: Flowing) -> None:
    flowing.trainer.kill()
    time.sleep(1.0)
    published = flowing.published
    assert published > 100
    flowing.system.start("image_vae")
    assert flowing.settled(beyond=published)["lost"]["image_vae"] == 0


@pytest.mark.slow
def test_a_trainer_killed_in_the_middle_of_fetching_has_it_all_in_the_end(flowing: Flowing) -> None:
    chance = seeded()
    for _ in range(5):
        flowing.trainer.signal(signal.SIGSTOP)
        time.sleep(4.0)
        flowing.trainer.signal(signal.SIGCONT)
        time.sleep(chance.uniform(0.0, 0.4))
        flowing.trainer.kill()
        flowing.trainer = flowing.system.start("image_vae")
        poll_for(lambda: flowing.system.service("image_vae").get("pid") == flowing.trainer.pid, 40, "it is back")
    flowing.system.wait_running()
    assert flowing.system.ami("pause").returncode == 0
    told = poll_for(lambda: (t := flowing.told())["behind"]["image_vae"] == 0 and t, 20, "all arrived")
    assert told["lost"]["image_vae"] == 0
    assert told["received"]["image_vae"] >= BUFFER, "as far back as its buffer reaches"


@pytest.mark.slow
def test_a_trainer_killed_in_the_middle_of_publishing_leaves_whole_parameters_everywhere(
    make_system: MakeSystem,
) -> None:
    chance = seeded()
    flowing = Flowing(make_system(*FAST, "trainers.image_vae.service.publish_interval=0.02", "models=small"))
    version = 0
    for _ in range(8):
        poll_for(lambda v=version: flowing.system.model()["version"] > v + 10, 40, "snapshots flow")
        time.sleep(chance.uniform(0.0, 0.1))
        flowing.trainer.kill()
        used = flowing.system.model()["used"].get("body", 0)
        assert used >= version, "versions never go back"
        version = flowing.system.model()["version"]
        flowing.trainer = flowing.system.start("image_vae")
    status = flowing.system.wait_running()
    told = {service["name"]: service for service in status["services"]}
    assert told["body"]["wire_errors"] == 0
    assert told["body"]["snapshots_from_memory"] > 0
    assert status["hub"]["snapshots_refused"] == 0


def test_a_killed_body_begins_a_new_life_whose_records_all_arrive(flowing: Flowing) -> None:
    before = flowing.received
    flowing.body.kill()
    second = flowing.system.start("body")
    poll_for(lambda: flowing.system.service("body").get("pid") == second.pid, 20, "the new body has joined")
    poll_for(lambda: flowing.published > 200, 10)
    assert flowing.system.ami("pause").returncode == 0
    told = poll_for(lambda: (t := flowing.told())["behind"]["image_vae"] == 0 and t, 10, "all arrived")
    assert told["received"]["image_vae"] >= before + told["published"], (
        "what the first life left, and all of the second"
    )


@pytest.mark.slow
def test_what_left_the_ring_is_counted_and_said(make_system: MakeSystem) -> None:
    flowing = Flowing(make_system(*FAST, "inference.retained_mb=1"))
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
    base = free_base_port(5) if system.hub.port > 40_000 else system.hub.port + 60
    proxy = FaultProxy(range(base, base + 5), range(system.hub.port, system.hub.port + 5))
    yield Flowing(system, f"hub=127.0.0.1:{base}"), proxy
    proxy.close()


@pytest.mark.parametrize("fault", ["frozen", "cut"])
def test_a_link_that_fails_is_healed(proxied: tuple[Flowing, FaultProxy], fault: str) -> None:
    flowing, proxy = proxied
    skipped = flowing.system.service("body")["skipped_ticks"]
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
    assert flowing.system.service("body")["skipped_ticks"] < skipped + 150, "acting did not wait"


@pytest.mark.slow
def test_joining_and_leaving_many_times_leaves_nothing_behind(flowing: Flowing) -> None:
    def descriptors(process: Process) -> int:
        return len(os.listdir(f"/proc/{process.pid}/fd"))

    def come_and_go() -> None:
        with flowing.system.listening() as collect:
            collect(0.02)

    come_and_go()
    before = {process.name: descriptors(process) for process in (flowing.controller, flowing.body)}
    for _ in range(100):
        come_and_go()
    poll_for(lambda: descriptors(flowing.controller) <= before["controller"] + 4, 10, "no descriptor is leaked")
    assert descriptors(flowing.body) <= before["body"] + 4
    assert flowing.settled(beyond=flowing.published)["lost"]["image_vae"] == 0
