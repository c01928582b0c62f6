"""The curious agent with all its trainers, as real processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from processes import System, poll_for, unchanged

from ami_shared.records import RecordBatch

TRAINERS = ("image_vae", "forward_dynamics", "ppo")
QUICK = ("trainers.ppo.rollout_length=32", "trainers.forward_dynamics.first_after=32")


def test_the_curious_agent_lives_learns_and_acts_with_all_that_it_learned(make_system: Callable[..., System]) -> None:
    system = make_system(*QUICK, curious=True)
    system.start("up")
    system.wait_running()

    def all_learned() -> bool:
        used = {model["name"]: model["used"].get("body", 0) for model in system.status()["models"]}
        return all(used.get(name, 0) >= 3 for name in ("image_encoder", "forward_dynamics", "policy_value"))

    poll_for(all_learned, 60.0, "the third version of every model in the body")
    with system.listening() as collect:
        check_rewards(collect)
    status = system.status()
    for name in TRAINERS:
        assert status["experience"][0]["lost"][name] == 0
    system.command("pause")
    before = unchanged(lambda: {name: system.service(name)["steps"] for name in (*TRAINERS, "body")})
    system.command("resume")
    poll_for(lambda: system.service("ppo")["steps"] > before["ppo"], 30.0, "more gradient steps of ppo")
    assert system.ami("shutdown").returncode == 0


@pytest.mark.parametrize(
    ("features", "quick", "version"),
    [
        ("random_features", "trainers.random_features.buffer.capacity=32", 2),
        ("inverse_dynamics", "trainers.inverse_dynamics.first_after=32", 3),
    ],
)
def test_the_agent_lives_on_features_without_a_decoder(
    make_system: Callable[..., System], features: str, quick: str, version: int
) -> None:
    """Random features have two versions: as initialised, and normalised."""
    system = make_system(*QUICK, f"features={features}", quick, curious=True)
    system.start("up")
    system.wait_running()

    def used() -> dict[str, int]:
        return {model["name"]: model["used"].get("body", 0) for model in system.status()["models"]}

    poll_for(lambda: used().get("image_encoder", 0) >= version, 60.0, "the encoder in the body")
    learned = used()["forward_dynamics"]
    poll_for(lambda: used()["forward_dynamics"] > learned + 1, 60.0, "forward dynamics of these features")
    if features == "random_features":
        assert used()["image_encoder"] == version, "random features stay"
    else:
        poll_for(lambda: used()["image_encoder"] > version, what="newer features in the body")
    assert "image_decoder" not in used()
    with system.listening() as collect:
        check_rewards(collect)
    assert system.ami("shutdown").returncode == 0


def check_rewards(collect: Callable[[float], list[RecordBatch]]) -> None:
    """Rewards are the normalised surprise: there, finite, not all the same; log-probabilities add up."""
    batches: list[RecordBatch] = []

    def enough() -> bool:
        batches.extend(collect(1.0))
        return sum(int(batch.data["rewarded"].sum()) for batch in batches) > 10

    poll_for(enough, what="rewards")
    rewards = np.concatenate([batch.data["reward"][batch.data["rewarded"]] for batch in batches])
    assert np.isfinite(rewards).all()
    assert rewards.std() > 0
    for batch in batches:
        np.testing.assert_allclose(batch.data["log_prob"], batch.data["log_probs"].sum(axis=1), rtol=1e-5)
        assert batch.data["hidden"].dtype == np.complex64
