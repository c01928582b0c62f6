"""The loads of `make bench` are settings that every trainer takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ami_shared.config import load_config
from ami_trainer.service import build_trainer

BENCHMARK = Path(__file__).parents[2] / "benchmarks/tick_lateness.py"


def loads() -> dict[str, list[str]]:
    spec = importlib.util.spec_from_file_location(BENCHMARK.stem, BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, list[str]] = module.LOADS
    return found


@pytest.mark.parametrize("trainer", ["image_vae", "forward_dynamics", "ppo"])
@pytest.mark.parametrize("load", ["idle", "training"])
def test_every_trainer_can_be_made_with_a_load_of_the_benchmark(trainer: str, load: str) -> None:
    build_trainer(load_config([f"trainer={trainer}", "models=tiny", *loads()[load]]), team=None)
