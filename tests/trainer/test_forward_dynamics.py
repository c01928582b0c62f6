"""Forward dynamics with and without a decoder to draw by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learning import SIZE
from sharing import PlainDecoder, PlainEncoder, seen_and_done

from ami_shared.errors import WireError
from ami_shared.models.dynamics import ForwardDynamics
from ami_shared.models.replicas import Replicas
from ami_shared.models.vae import ImageEncoder
from ami_shared.snapshots import Snapshot
from ami_trainer.trainers import ForwardDynamicsTrainer, forward_dynamics

BURN_IN, STRIP = 1, 8


def made(**models: Any) -> ForwardDynamicsTrainer:
    """A trainer whose followed models have all come."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dynamics = ForwardDynamics(8, (3,), width=8, depth=2, feedforward=8)
    settings = {"window": 8, "burn_in": BURN_IN, "batch_size": 4, "first_after": 8, "updates_per_record": 0.5}
    trainer = ForwardDynamicsTrainer(dynamics, PlainEncoder(), **models, **settings)
    replicas = Replicas(trainer.followed_models)
    trainer.follow(replicas)
    trainer.consume(seen_and_done(24, np.random.default_rng(0)), False)
    assert not trainer.is_trainable(), "without an encoder there is nothing to learn from"
    for name, model in trainer.followed_models.items():
        replicas.offer(Snapshot(name, 1, 0.0, {key: tensor.numpy() for key, tensor in model.state_dict().items()}))
    return trainer


@pytest.mark.parametrize("models", [{}, {"decoder": None}], ids=str)
def test_without_a_decoder_it_learns_and_draws_nothing(models: dict[str, Any]) -> None:
    trainer = made(**models)
    assert list(trainer.followed_models) == ["image_encoder"]
    assert trainer.is_trainable()
    metrics = list(trainer.train())
    assert len(metrics) == 12
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert trainer.picture() is None


def test_records_whose_hidden_state_is_not_finite_are_refused() -> None:
    trainer = made()
    seen = len(trainer._buffer)
    batch = seen_and_done(8, np.random.default_rng(0))
    batch.data["hidden"][3, 1, 2] = np.nan
    with pytest.raises(WireError, match=r"hidden states of .* not finite"):
        trainer.consume(batch, True)
    assert len(trainer._buffer) == seen


@pytest.mark.parametrize(("dtype", "size"), [("float32", SIZE), ("uint8", 20)])
def test_frames_that_the_encoder_does_not_take_are_refused_though_they_come_first(dtype: str, size: int) -> None:
    shape = {"height": SIZE, "width": SIZE, "channels": [8, 8, 8], "embedding": 8}
    trainer = ForwardDynamicsTrainer(ForwardDynamics(8, (3,), 8, 2, 8), ImageEncoder(**shape, hidden=8), window=8)
    batch = seen_and_done(8, np.random.default_rng(0))
    frames = np.zeros((len(batch), 3, size, size), dtype)
    with pytest.raises(WireError, match="observation"):
        trainer.consume(replace(batch, data={**batch.data, "observation": frames}), True)
    trainer.consume(batch, True)


def test_with_a_decoder_it_learns_the_same_and_draws() -> None:
    trainer = made(decoder=PlainDecoder())
    assert list(trainer.followed_models) == ["image_encoder", "image_decoder"]
    losses = [metrics["loss"] for metrics in trainer.train()]
    picture = trainer.picture()
    assert picture is not None
    assert picture.pixels.shape == (4 * SIZE, STRIP * SIZE, 3)
    assert losses == [metrics["loss"] for metrics in made().train()]
    assert len(losses) == 12


def test_a_burst_whose_last_window_is_overwritten_meanwhile_ends_and_goes_on_when_there_are_others() -> None:
    trainer = made()
    steps = trainer.train()
    next(steps)
    taken = trainer.updates
    for n in range(700):  # segments of four records, of which no window of eight is made
        trainer.consume(replace(seen_and_done(4, np.random.default_rng(n)), first_sequence=1_000 + 4 * n), False)
    assert list(steps) == []
    assert trainer.updates == taken
    assert not trainer.is_trainable()
    trainer.consume(replace(seen_and_done(24, np.random.default_rng(0)), first_sequence=9_000), False)
    assert trainer.is_trainable()


def test_the_error_is_told_beside_that_of_no_change_whose_scale_is_the_same() -> None:
    trainer = made()
    metrics = list(trainer.train())
    share = metrics[0]["fresh_loss"] / metrics[0]["fresh_loss_of_no_change"]
    assert trainer.statistics()["fresh_error"]["first"] == pytest.approx(share)


def test_where_records_come_one_by_one_a_burst_lies_between_two_measurements() -> None:
    trainer, random = made(), np.random.default_rng(7)
    for _ in trainer.train():
        pass
    begun, told = trainer.updates, []
    for n in range(200):
        trainer.consume(replace(seen_and_done(1, random), first_sequence=24 + n), True)
        while trainer.is_trainable():
            told += [trainer.updates for metrics in trainer.train() if "fresh_loss" in metrics]
    assert trainer.updates > begun + 60
    assert min(np.diff(told)) >= trainer._burst


def test_embeddings_that_tell_nothing_apart_yet_are_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of an untrained encoder's "no change", which is next to nothing, would be in the thousands."""
    trainer = made()
    monkeypatch.setattr(forward_dynamics, "TELLING", 1e9)
    list(trainer.train())
    assert trainer.statistics()["fresh_error"]["first"] is None


def test_nothing_is_learned_on_an_encoder_that_is_withdrawn_before_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = made()
    assert trainer.is_trainable()
    monkeypatch.setattr(trainer._replicas, "swap", lambda: False)  # a newer one is just being filled in
    assert list(trainer.train()) == []
    monkeypatch.undo()
    assert list(trainer.train())
