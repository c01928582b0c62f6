"""Bodies of one system live different lives."""

from __future__ import annotations

from ami_inference.service import own_seed
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
