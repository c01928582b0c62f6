"""What the benchmarks load trainers with is what they take, and makes them learn."""

from __future__ import annotations

import pytest
from gradient_steps import served
from tick_lateness import LOADS

from ami_shared.config import load_config
from ami_trainer.service import build_trainer


@pytest.mark.parametrize("trainer", ["image_vae", "forward_dynamics", "ppo"])
@pytest.mark.parametrize("load", ["idle", "training"])
def test_every_trainer_can_be_made_with_a_load_of_the_benchmark(trainer: str, load: str) -> None:
    build_trainer(load_config([f"trainer={trainer}", "models=tiny", *LOADS[load]]), team=None)


@pytest.mark.parametrize("trainer", ["image_vae", "forward_dynamics", "ppo"])
def test_the_trainers_whose_gradient_steps_are_counted_take_some(trainer: str) -> None:
    assert served(load_config(["models=tiny"]), trainer, seconds=5.0) > 0.0
