"""The loads of `make bench` are settings that every trainer takes."""

from __future__ import annotations

import pytest
from tick_lateness import LOADS

from ami_shared.config import load_config
from ami_trainer.service import build_trainer


@pytest.mark.parametrize("trainer", ["image_vae", "forward_dynamics", "ppo"])
@pytest.mark.parametrize("load", ["idle", "training"])
def test_every_trainer_can_be_made_with_a_load_of_the_benchmark(trainer: str, load: str) -> None:
    build_trainer(load_config([f"trainer={trainer}", "models=tiny", *LOADS[load]]), team=None)
