"""Bodies of one system live different lives."""

from __future__ import annotations

import pytest

from ami_inference.service import own_seed, own_world
from ami_shared.config import load_config


def test_each_name_has_a_seed_of_its_own_and_a_body_that_is_alone_the_configured_one() -> None:
    seeds = {
        (name, seed): own_seed(load_config([f"inference.name={name}", f"seed={seed}"]))
        for name in ("body", "a", "b")
        for seed in (3, 4)
    }
    assert (seeds["body", 3], seeds["body", 4]) == (3, 4)
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 1 << 32 for seed in seeds.values())


@pytest.mark.parametrize("experiment", ["cartpole", "doom", "noise"])
def test_each_body_s_world_has_the_seed_of_its_own(experiment: str) -> None:
    for name in ("body", "second"):
        overrides = [f"experiment={experiment}", f"inference.name={name}", "seed=3"]
        config = load_config(overrides)
        world = own_world(config, overrides)
        assert world.get("seed", world.get("sensor", {}).get("seed")) == own_seed(config)
    assert own_world(config, [*overrides, f"{seed_of(experiment)}=7"]) != world, "what is said of it holds"


def seed_of(experiment: str) -> str:
    return "inference.environment." + ("sensor.seed" if experiment == "noise" else "seed")
