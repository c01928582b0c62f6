"""Random features: normalised once, and then fixed for ever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learning import SIZE, batch_of

from ami_shared.errors import WireError
from ami_shared.models.vae import ImageEncoder
from ami_shared.records import Record, RecordBatch
from ami_shared.state import copied, from_files, to_files
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.trainers import RandomFeaturesTrainer


def made(seed: int = 0, frames: int = 64) -> RandomFeaturesTrainer:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    encoder = ImageEncoder(SIZE, SIZE, [8, 8, 8], hidden=32, embedding=16)
    return RandomFeaturesTrainer(encoder, RandomImageBuffer(frames, SIZE, SIZE))


def noise(count: int, seed: int = 0) -> RecordBatch:
    random = np.random.default_rng(seed)
    frames = random.integers(0, 256, (count, 3, SIZE, SIZE), np.uint8)
    return RecordBatch.stack(
        "body", "a", [Record(0, n, 0.0, 0.0, {}, {"observation": f}) for n, f in enumerate(frames)]
    )


def parameters(trainer: RandomFeaturesTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.published_models["image_encoder"].state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_a_full_buffer_normalises_the_embedding() -> None:
    trainer = made()
    trainer.consume(noise(40), continues=True)
    assert not trainer.is_trainable(), "too few frames to know the scale"
    trainer.consume(noise(24, seed=1), continues=True)
    (metrics,) = trainer.train()
    assert 0 < metrics["deviation_as_initialised"] < 0.5
    frames = np.concatenate([noise(40).data["observation"], noise(24, seed=1).data["observation"]])
    embeddings = trainer.published_models["image_encoder"](torch.from_numpy(frames))
    torch.testing.assert_close(embeddings.mean(dim=0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(embeddings.std(dim=0, correction=0), torch.ones(16), atol=1e-2, rtol=0)


def test_frames_that_are_all_the_same_give_finite_features() -> None:
    trainer = made()
    records = [Record(0, n, 0.0, 0.0, {}, {"observation": np.zeros((3, SIZE, SIZE), np.uint8)}) for n in range(64)]
    trainer.consume(RecordBatch.stack("body", "a", records), continues=True)
    list(trainer.train())
    assert all(bool(tensor.isfinite().all()) for tensor in parameters(trainer).values())


def test_once_normalised_nothing_changes_any_more() -> None:
    trainer = made()
    trainer.consume(noise(64), continues=True)
    assert len(list(trainer.train())) == 1
    fixed = parameters(trainer)
    trainer.consume(noise(200, seed=1), continues=True)
    assert not trainer.is_trainable()
    assert same(parameters(trainer), fixed)
    assert trainer.updates == 1


def test_a_trainer_that_comes_back_has_the_very_same_features() -> None:
    straight, again = made(), made(seed=7)
    straight.consume(noise(64), continues=True)
    list(straight.train())
    files = to_files("x", copied(straight.state()))
    again.published_models["image_encoder"].load_state_dict(parameters(straight))
    again.restore(from_files("x", {file.path: file.read(0, 1 << 30) for file in files}))
    assert same(parameters(again), parameters(straight))
    again.consume(noise(64, seed=1), continues=True)
    assert not again.is_trainable(), "who has the snapshot is normalised"
    assert again.updates == 1


def test_a_trainer_that_comes_back_before_it_was_normalised_goes_on_filling() -> None:
    straight, again = made(), made(seed=7)
    straight.consume(noise(40), continues=True)
    files = to_files("x", copied(straight.state()))
    again.published_models["image_encoder"].load_state_dict(parameters(straight))
    again.restore(from_files("x", {file.path: file.read(0, 1 << 30) for file in files}))
    for trainer in (straight, again):
        trainer.consume(noise(24, seed=1), continues=True)
        list(trainer.train())
    assert same(parameters(again), parameters(straight))


def test_records_without_an_observation_are_refused() -> None:
    with pytest.raises(WireError, match="no observation"):
        made().consume(batch_of(1, action=np.zeros(5, np.int64)), continues=True)
