"""What a trainer does where the bodies' streams stand at a cut of the whole system."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ami_shared.checkpoints import Cut
from ami_trainer.service import TrainerService

CUT = Cut("2026-11-24_12-00-00", ("body",))


class Part:
    """Notes what is offered and what is refused."""

    def __init__(self) -> None:
        self.offered: dict[str, Any] = {}
        self.reason = ""

    def taken(self, cut: Cut, trees: dict[str, Any]) -> None:
        self.offered = trees

    def refuse(self, cut: Cut, reason: str) -> None:
        self.reason = reason


@pytest.fixture
def service() -> Any:
    """A trainer's service whose streams stand at a cut, without sockets and threads."""
    made: Any = object.__new__(TrainerService)
    model = nn.Linear(2, 1)
    made.identity = SimpleNamespace(name="ppo")
    made.trainer = SimpleNamespace(published_models={"policy_value": model}, state=lambda: {"updates": 3})
    made.training = SimpleNamespace(state=dict)
    made.publisher = SimpleNamespace(versions={"policy_value": 7})
    made.passed = []
    made.intake = SimpleNamespace(state=dict, feeder=SimpleNamespace(cut=CUT, pass_cut=made.passed.append))
    made._part = Part()
    return made


def test_a_cut_takes_along_the_models_the_trainer_and_the_versions(service: Any) -> None:
    service._take_cut()
    weight = service.trainer.published_models["policy_value"].weight.detach().numpy()
    assert np.array_equal(service._part.offered["models/policy_value"]["weight"], weight)
    kept = service._part.offered["trainers/ppo"]
    assert (kept["trainer"], kept["versions"]) == ({"updates": 3, "class": "SimpleNamespace"}, {"policy_value": 7})
    assert service.passed == [CUT]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_not_saved_and_life_goes_on(service: Any, value: float) -> None:
    with torch.no_grad():
        service.trainer.published_models["policy_value"].weight[0, 1] = value
    service._take_cut()
    assert service._part.offered == {}
    assert service._part.reason == "policy_value not finite"
    assert service.passed == [CUT]
