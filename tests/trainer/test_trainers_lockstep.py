"""Notices of trainers that have settled: heard by all, the sender among them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ami_shared.settled import Settled
from ami_trainer.service import TrainerService


def test_a_notice_that_tells_nothing_new_wakes_nobody() -> None:
    """Otherwise a trainer that hears itself settle would settle again, as fast as the wire goes."""
    woken: list[bool] = []
    service: Any = SimpleNamespace(_heard_settled={}, training=SimpleNamespace(new_data=lambda: woken.append(True)))
    notice = Settled("forward_dynamics", {"a body's incarnation": 128}, {"forward_dynamics": 3})
    for heard in (notice, replace(notice), replace(notice, versions={"forward_dynamics": 4})):
        TrainerService._hear_settled(service, heard)
    assert len(woken) == 2
    assert service._heard_settled["forward_dynamics"].versions == {"forward_dynamics": 4}
