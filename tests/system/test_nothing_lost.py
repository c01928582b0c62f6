"""Whatever happens to trainer, controller or body: every record of a living body reaches every buffer exactly once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from processes import System, poll_for

from ami_shared.errors import AmiError

MakeSystem = Callable[..., System]
FAST = ("experiment=noise", "inference.interval=0.01")


@pytest.fixture
def system(make_system: MakeSystem) -> System:
    """Controller, body and trainer at a hundred records a second."""
    made = make_system(*FAST)
    made.started = {name: made.start(name) for name in ("controller", "body", "image_vae")}  # type: ignore[attr-defined]
    made.wait_running()
    poll_for(lambda: stream(made)["received"].get("image_vae", 0) > 50, 10, "records flow")
    return made


def stream(system: System) -> dict[str, Any]:
    try:
        streams: list[dict[str, Any]] = system.status()["experience"]
    except AmiError:
        return {"received": {}, "published": 0}
    return streams[0] if streams else {"received": {}, "published": 0}


def healed(system: System, beyond: int) -> dict[str, Any]:
    """Return the stream's status as soon as the trainer has everything and more than `beyond` records."""

    def whole() -> dict[str, Any] | None:
        told = stream(system)
        received = told["received"].get("image_vae", 0)
        return told if received > beyond and told["behind"]["image_vae"] <= 20 else None

    return poll_for(whole, 20, "the trainer caught up")  # type: ignore[return-value]


def assert_whole(told: dict[str, Any]) -> None:
    """All that was published was received, or is on its way since the last heartbeats."""
    assert told["lost"]["image_vae"] == 0, told
    assert told["overflowed"] == 0
    assert abs(told["published"] - told["received"]["image_vae"]) < 150, told


def test_a_stopped_trainer_fetches_what_it_slept_through(system: System) -> None:
    trainer = system.started["image_vae"]  # type: ignore[attr-defined]
    trainer.signal(signal.SIGSTOP)
    time.sleep(5.0)
    slept = stream(system)["published"]
    trainer.signal(signal.SIGCONT)
    told = healed(system, beyond=slept)
    assert_whole(told)
    assert told["missed"]["image_vae"] > 0, "its link was cut meanwhile"


def test_a_killed_controller_costs_no_record(system: System) -> None:
    system.started["controller"].kill()  # type: ignore[attr-defined]
    before = time.monotonic()
    time.sleep(3.0)
    system.start("controller")
    system.wait_running(15.0)
    told = healed(system, beyond=int(90 * (time.monotonic() - before)))
    assert_whole(told)


def test_a_killed_trainer_has_the_past_back_from_the_ring(system: System) -> None:
    system.started["image_vae"].kill()  # type: ignore[attr-defined]
    time.sleep(1.0)
    published = stream(system)["published"]
    assert published > 100
    system.start("image_vae")
    told = healed(system, beyond=published)
    assert_whole(told)


def test_what_left_the_ring_is_counted_and_said(make_system: MakeSystem) -> None:
    system = make_system(*FAST, "inference.retained_mb=1", "observation.height=84", "observation.width=84")
    system.start("controller")
    system.start("body")
    trainer = system.start("image_vae")
    system.wait_running()
    poll_for(lambda: stream(system)["received"].get("image_vae", 0) > 50, 10, "records flow")
    trainer.signal(signal.SIGSTOP)
    time.sleep(5.0)
    slept = stream(system)["published"]
    trainer.signal(signal.SIGCONT)
    poll_for(lambda: stream(system)["lost"]["image_vae"] > 100, 20, "what is gone is counted")
    told = healed(system, beyond=slept - stream(system)["lost"]["image_vae"])
    total = told["received"]["image_vae"] + told["lost"]["image_vae"]
    assert abs(told["published"] - total) < 150
    assert f"image_vae lost {told['lost']['image_vae']} records of body" in system.ami("status").stdout
