"""Features of inverse dynamics, learned from a stripe that actions move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learning import SIZE, batch_of

from ami_shared.errors import ConfigurationError, WireError
from ami_shared.models.inverse_dynamics import InverseDynamics
from ami_shared.models.vae import ImageEncoder
from ami_shared.records import Record, RecordBatch
from ami_shared.state import copied, from_files, to_files
from ami_trainer.fresh_error import FIRST
from ami_trainer.trainers import InverseDynamicsTrainer
from ami_trainer.trainers.inverse_dynamics import chance

CHOICES = (3, 2)
MOVED = (0, 8, -8)


def made(**options: Any) -> InverseDynamicsTrainer:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    encoder = ImageEncoder(SIZE, SIZE, [8, 8, 8], hidden=32, embedding=16)
    settings = {"batch_size": 32, "first_after": 8, "burst": 10, "updates_per_record": 1.0, **options}
    return InverseDynamicsTrainer(encoder, InverseDynamics(16, CHOICES, hidden=32), **settings)


def lived(count: int, first: int = 0, seed: int = 0) -> RecordBatch:
    """A bright stripe: the first action dimension moves it, the second sets the brightness of the background."""
    random = np.random.default_rng((seed, first))
    place, background = 18, 0
    records = []
    for n in range(first, first + count):
        frame = np.full((3, SIZE, SIZE), 60 * background, np.uint8)
        frame[:, :, place : place + 4] = 220
        action = random.integers(CHOICES)
        records.append(Record(0, n, 0.0, 0.0, {}, {"observation": frame, "action": action}))
        place, background = (place + MOVED[action[0]]) % (SIZE - 4), int(action[1])
    return RecordBatch.stack("body", f"life {seed}", records)


def test_it_learns_to_tell_the_action_from_fresh_pairs() -> None:
    trainer = made(updates_per_record=2.0)
    fresh = []
    for turn in range(4):
        trainer.consume(lived(100, seed=turn), continues=False)
        while trainer.is_trainable():
            fresh += [metrics for metrics in trainer.train() if "fresh_accuracy" in metrics]
    first, last = fresh[0], fresh[-1]
    assert first["fresh_accuracy"] < 0.65, "at first no more than chance"
    assert last["fresh_accuracy"] > last["fresh_accuracy_of_chance"] + 0.2
    assert last["fresh_loss"] < 0.7 * last["fresh_loss_of_chance"]
    assert len(fresh) <= FIRST
    mean = np.mean([metrics["fresh_loss"] for metrics in fresh])
    assert trainer.statistics()["fresh_error"] == {"first": pytest.approx(mean), "now": pytest.approx(mean)}


def test_where_records_come_one_by_one_it_is_measured_on_several_beside_the_chance_of_the_whole_buffer() -> None:
    trainer = made(burst=20, first_after=40)
    measured = []
    for n in range(200):
        trainer.consume(lived(1, n), continues=True)
        while trainer.is_trainable():
            measured += [metrics for metrics in trainer.train() if "fresh_loss" in metrics]
    assert trainer.updates // 20 - 1 <= len(measured) <= trainer.updates // 20
    assert min(metrics["fresh_loss_of_chance"] for metrics in measured) > 0.9 * (np.log(3) + np.log(2))
    assert max(metrics["fresh_accuracy_of_chance"] for metrics in measured) < 0.6


def test_chance_is_who_knows_only_how_often_is_what() -> None:
    actions = np.array([[0, 1], [0, 0], [1, 1], [2, 0]])
    entropy, share = chance(actions, CHOICES)
    assert entropy == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(4)) + np.log(2))
    assert share == pytest.approx((0.5 + 0.5) / 2)


def test_cross_entropy_is_the_sum_over_the_action_dimensions() -> None:
    model = InverseDynamics(4, CHOICES, hidden=8)
    logits = torch.zeros(5, sum(CHOICES))
    losses = model.cross_entropy(logits, torch.zeros(5, 2, dtype=torch.int64))
    assert losses.shape == (5,)
    torch.testing.assert_close(losses, torch.full((5,), float(np.log(3) + np.log(2))))
    logits[0, 2], logits[0, 4] = 1.0, 1.0
    assert model.likeliest(logits)[0].tolist() == [2, 1]


def test_encoder_and_inverse_are_published() -> None:
    assert list(made().published_models) == ["image_encoder", "inverse_dynamics"]


def test_no_pair_crosses_a_border_of_segments() -> None:
    trainer = made(first_after=2)
    for n in range(4):
        trainer.consume(lived(1, n), continues=False)
    assert not trainer.is_trainable()


def test_records_without_a_fitting_action_are_refused() -> None:
    with pytest.raises(WireError, match="action"):
        made().consume(batch_of(1), continues=True)


def test_a_buffer_too_small_for_its_beginning_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="capacity=4"):
        made(capacity=4)


def test_it_takes_the_same_steps_after_a_restore() -> None:
    straight, again = made(), made()
    straight.consume(lived(40), continues=False)
    list(straight.train())
    files = to_files("x", copied(straight.state()))
    for name, model in straight.published_models.items():
        again.published_models[name].load_state_dict(model.state_dict())
    again.restore(from_files("x", {file.path: file.read(0, 1 << 30) for file in files}))
    told = []
    for trainer in (straight, again):
        trainer.consume(lived(20, 40), continues=True)
        told.append([metrics["loss"] for metrics in trainer.train()])
    assert told[0] == told[1]
    assert straight.updates == again.updates == 20
