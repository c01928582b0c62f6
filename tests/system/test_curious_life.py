"""The curious agent with all its trainers, as real processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from processes import System, poll_for

from ami_shared.records import RecordBatch

TRAINERS = ("image_vae", "forward_dynamics", "ppo")
QUICK = ("trainers.ppo.rollout_length=32", "trainers.forward_dynamics.first_after=32")


def test_the_curious_agent_lives_learns_and_acts_with_all_that_it_learned(make_system: Callable[..., System]) -> None:
    system = make_system(*QUICK, curious=True)
    system.start("up")
    system.wait_running(60.0)

    def all_learned() -> bool:
        used = {model["name"]: model["used"].get("body", 0) for model in system.status()["models"]}
        return all(used.get(name, 0) >= 3 for name in ("image_encoder", "forward_dynamics", "policy_value"))

    poll_for(all_learned, 60.0, "the third version of every model in the body")
    with system.listening() as collect:
        batches = collect(3.0)
    check_rewards(batches)
    status = system.status()
    for name in TRAINERS:
        assert status["experience"][0]["lost"][name] == 0
    assert system.ami("pause").returncode == 0
    before = {name: system.service(name)["steps"] for name in (*TRAINERS, "body")}
    time.sleep(1.0)
    assert {name: system.service(name)["steps"] for name in (*TRAINERS, "body")} == before
    assert system.ami("resume").returncode == 0
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
    system.wait_running(60.0)

    def used() -> dict[str, int]:
        return {model["name"]: model["used"].get("body", 0) for model in system.status()["models"]}

    poll_for(lambda: used().get("image_encoder", 0) >= version, 60.0, "the encoder in the body")
    learned = used()["forward_dynamics"]
    poll_for(lambda: used()["forward_dynamics"] > learned + 1, 60.0, "forward dynamics of these features")
    assert (used()["image_encoder"] == version) == (features == "random_features"), "random features stay"
    assert "image_decoder" not in used()
    with system.listening() as collect:
        check_rewards(collect(3.0))
    assert system.ami("shutdown").returncode == 0


def check_rewards(batches: list[RecordBatch]) -> None:
    """Rewards are the normalised surprise: there, finite, not all the same; log-probabilities add up."""
    rewards = np.concatenate([batch.data["reward"][batch.data["rewarded"]] for batch in batches])
    assert len(rewards) > 10
    assert np.isfinite(rewards).all()
    assert rewards.std() > 0
    for batch in batches:
        np.testing.assert_allclose(batch.data["log_prob"], batch.data["log_probs"].sum(axis=1), rtol=1e-5)
        assert batch.data["hidden"].dtype == np.complex64
