from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from learning import SIZE, batch_of, tiny_trainer

from ami_shared.errors import ConfigurationError, WireError
from ami_shared.models.vae import ImageDecoder, ImageEncoder
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.trainers.image_vae import ImageVAETrainer


def test_it_learns_what_it_sees() -> None:
    trainer = tiny_trainer(updates_per_record=10.0, burst=150)
    trainer.consume(batch_of(16), continues=True)
    untrained = off(trainer)
    losses = [metrics["reconstruction_loss"] for metrics in trainer.train()]
    assert len(losses) == 150
    assert np.mean(losses[-10:]) < losses[0] / 5
    assert off(trainer) < 0.8 * untrained


def off(trainer: ImageVAETrainer) -> float:
    """Return by how much the frames in the trainer's picture differ from their reconstructions, of 255."""
    picture = trainer.picture()
    assert picture is not None
    assert picture.pixels.shape == (2 * SIZE, 8 * SIZE, 3)
    seen, made = picture.pixels[:SIZE].astype(float), picture.pixels[SIZE:].astype(float)
    return float(np.abs(seen - made).mean())


def test_a_buffer_too_small_to_begin_with_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"buffer\.capacity=64 must be at least first_after=65"):
        tiny_trainer(first_after=65)


def test_what_training_calls_is_compiled_if_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            compiled.append(function.__name__)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", noted)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    trainer = tiny_trainer(compile=True)
    trainer.consume(batch_of(16), continues=True)
    next(iter(trainer.train()))
    assert compiled == ["posterior"]


def test_it_trains_only_what_records_have_paid_for() -> None:
    trainer = tiny_trainer(updates_per_record=0.5, burst=100)
    assert not trainer.is_trainable()
    trainer.consume(batch_of(3), continues=True)
    assert not trainer.is_trainable(), "fewer frames than first_after"
    trainer.consume(batch_of(9, first=3), continues=True)
    assert len(list(trainer.train())) == 6
    assert not trainer.is_trainable()


def test_an_abandoned_burst_has_spent_only_its_steps() -> None:
    trainer = tiny_trainer()
    trainer.consume(batch_of(8), continues=True)
    steps = trainer.train()
    next(iter(steps))
    assert trainer.updates == 1
    assert trainer.statistics()["limiter"]["credit"] == 7


def test_the_error_on_fresh_frames_is_measured_before_training_on_them() -> None:
    trainer = tiny_trainer(burst=3)
    trainer.consume(batch_of(8), continues=True)
    metrics = list(trainer.train())
    assert "fresh_reconstruction_error" in metrics[0]
    assert "fresh_reconstruction_error" not in metrics[1]
    first = trainer.statistics()["fresh_error"]["first"]
    assert first == metrics[0]["fresh_reconstruction_error"] > 0


def test_encoder_and_decoder_are_published_and_measuring_leaves_them_unchanged() -> None:
    trainer = tiny_trainer()
    trainer.consume(batch_of(8), continues=True)
    list(trainer.train())
    models = trainer.published_models
    assert list(models) == ["image_encoder", "image_decoder"]
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    assert trainer.picture() is not None
    for name, model in models.items():
        assert all(torch.equal(before[name][key], value) for key, value in model.state_dict().items()), name


def test_records_without_an_observation_are_refused() -> None:
    with pytest.raises(WireError, match="no observation"):
        tiny_trainer().consume(batch_of(1, action=np.zeros(5, np.int64)), continues=True)


def test_where_frames_come_one_by_one_the_error_is_that_of_several() -> None:
    trainer = tiny_trainer(burst=6, updates_per_record=2.0, batch_size=4)
    looked_at: list[int] = []
    take = trainer._buffer.take_fresh

    def counted() -> Any:
        fresh = take()
        looked_at.append(len(fresh))
        return fresh

    trainer._buffer.take_fresh = counted  # type: ignore[method-assign]
    for n in range(30):
        trainer.consume(batch_of(1, first=n), continues=True)
        while trainer.is_trainable():
            list(trainer.train())
    assert len(looked_at) > 5
    assert min(looked_at[3:]) == 3, "after the first frames, which came together"
    again = tiny_trainer(burst=6, updates_per_record=2.0, batch_size=4)
    again.restore(trainer.state())
    assert again._measured_at == trainer._measured_at
    assert again.statistics()["fresh_error"] == trainer.statistics()["fresh_error"]


def test_a_checkpoint_of_before_errors_were_means_is_read() -> None:
    trainer = tiny_trainer()
    trainer.consume(batch_of(8), continues=True)
    list(trainer.train())
    state = {**trainer.state(), "fresh_error": [0.5, 0.25]}
    del state["fresh"]
    again = tiny_trainer()
    again.restore(state)
    assert again.statistics()["fresh_error"] == {"first": 0.5, "now": 0.25}


@pytest.mark.parametrize(
    ("part", "named"),
    [("decoder", r"models\.image_decoder"), ("size", r"models\.image_decoder"), ("buffer", "buffer: its frames")],
)
def test_models_and_buffer_that_do_not_fit_one_another_are_refused_at_once(part: str, named: str) -> None:
    shape: dict[str, Any] = {"height": SIZE, "width": SIZE, "channels": [8, 8, 8], "embedding": 16}
    of_decoder = {"decoder": {"embedding": 32}, "size": {"height": SIZE + 8}}.get(part, {})
    buffer = RandomImageBuffer(64, SIZE + (part == "buffer"), SIZE)
    with pytest.raises(ConfigurationError, match=named):
        ImageVAETrainer(ImageEncoder(**shape, hidden=32), ImageDecoder(**shape | of_decoder), buffer)
