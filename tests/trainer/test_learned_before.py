"""A trainer that begins where an earlier process of its name ended."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from ami_shared.errors import ConfigurationError
from ami_shared.gate import Desired, Gate
from ami_shared.membership import Identity
from ami_shared.models.parameters import read_arrays
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message
from ami_trainer.learned_before import LearnedBefore


class Controller:
    """Answers a trainer's questions at once, or never."""

    def __init__(self, versions: Mapping[str, int], module: nn.Module, silent: bool = False) -> None:
        self.versions, self._module, self._silent = versions, module, silent
        self.asked: list[Message] = []
        self.learned: LearnedBefore | None = None

    def send(self, message: Message) -> None:
        self.asked.append(message)
        if not self._silent and self.learned:
            self.learned.came(self.snapshot(message.get("model", str)))

    def snapshot(self, model: str) -> Message:
        return Snapshot(model, 7, 1.0, read_arrays(self._module)).to_message("controller", "1")


def set_up(controller: Controller, module: nn.Module) -> LearnedBefore:
    controller.learned = LearnedBefore(Identity("image_vae", "trainer"), {"image_encoder": module})
    return controller.learned


def test_the_models_are_filled_with_what_the_controller_keeps() -> None:
    old, new = nn.Linear(2, 3), nn.Linear(2, 3)
    controller = Controller({"image_encoder": 7, "other": 3}, old)
    assert set_up(controller, new).take_up(controller, Gate())
    torch.testing.assert_close(new.state_dict(), old.state_dict())
    assert [(m.kind, m.fields) for m in controller.asked] == [
        ("get_parameters", {"model": "image_encoder", "newer_than": 0})
    ]


def test_without_a_snapshot_the_models_stay_new() -> None:
    module = nn.Linear(2, 3)
    before = read_arrays(module)
    controller = Controller({}, module)
    assert set_up(controller, module).take_up(controller, Gate())
    np.testing.assert_array_equal(read_arrays(module)["weight"], before["weight"])
    assert controller.asked == []


def test_a_snapshot_of_other_models_is_a_configuration_error() -> None:
    controller = Controller({"image_encoder": 7}, nn.Linear(4, 3))
    with pytest.raises(ConfigurationError, match="version 7 of image_encoder does not fit"):
        set_up(controller, nn.Linear(2, 3)).take_up(controller, Gate())


def test_waiting_ends_with_the_system_and_confirms_a_pause() -> None:
    gate = Gate()
    gate.wish(Desired(paused=True, epoch=4))
    controller = Controller({"image_encoder": 7}, nn.Linear(2, 3), silent=True)
    gate.on_change = gate.stop
    patience = threading.Timer(30.0, gate.stop)
    patience.start()
    assert not set_up(controller, nn.Linear(2, 3)).take_up(controller, gate)
    patience.cancel()
    assert (gate.condition.state, gate.condition.epoch) == ("paused", 4)


def test_later_snapshots_of_own_models_change_nothing_and_others_are_not_taken() -> None:
    module = nn.Linear(2, 3)
    controller = Controller({}, nn.Linear(2, 3))
    learned = set_up(controller, module)
    learned.take_up(controller, Gate())
    before = read_arrays(module)
    assert learned.came(controller.snapshot("image_encoder"))
    np.testing.assert_array_equal(read_arrays(module)["weight"], before["weight"])
    assert not learned.came(controller.snapshot("another"))
