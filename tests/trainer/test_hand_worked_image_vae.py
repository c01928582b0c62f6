"""The variational autoencoder's loss beside that of its definition, one number after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ami_shared.records import Record, RecordBatch
from ami_trainer.buffers.random_image import RandomImageBuffer
from ami_trainer.trainers import ImageVAETrainer

GAINS, DEVIATIONS, WEIGHTS = (0.5, -2.0), (0.25, 1.5), (1.0, 0.125)
SIDE = 2


class Gauge(nn.Module):
    """An encoder of brightness: each mean is so many times a frame's average, each deviation is always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.gains, self.deviations = nn.Parameter(torch.tensor(GAINS)), nn.Parameter(torch.tensor(DEVIATIONS))

    def forward(self, observation: Tensor) -> Tensor:
        return observation.float().mean(dim=(1, 2, 3))[:, None] / 255 * self.gains

    def posterior(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean = self(observation)
        return mean, self.deviations.expand_as(mean)


class Lamp(nn.Module):
    """A decoder that makes all pixels of a frame equally bright: a weighted sum of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(WEIGHTS))

    def forward(self, embedding: Tensor) -> Tensor:
        return (embedding @ self.weights)[:, None, None, None].expand(-1, 3, SIDE, SIDE)


def made(**options: Any) -> ImageVAETrainer:
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"batch_size": 4, "first_after": 4, "updates_per_record": 1.0, **options}
    encoder: Any = Gauge()
    return ImageVAETrainer(encoder, Lamp(), RandomImageBuffer(8, SIDE, SIDE), **settings)


def some_frames(count: int = 4) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, SIDE, SIDE), np.uint8)


def squared_error(frame: np.ndarray[Any, Any], noise: list[float]) -> float:
    """Mean over the pixels of a frame, whose embedding lies so many deviations beside its mean."""
    pixels = [int(pixel) / 255 for pixel in frame.flat]
    average = sum(pixels) / len(pixels)
    embedding = [gain * average + s * e for gain, s, e in zip(GAINS, DEVIATIONS, noise, strict=True)]
    made = sum(weight * z for weight, z in zip(WEIGHTS, embedding, strict=True))
    return sum((made - pixel) ** 2 for pixel in pixels) / len(pixels)


def divergences(frame: np.ndarray[Any, Any]) -> Iterator[float]:
    """KL(N(μ, σ) ‖ N(0, 1)) = (μ² + σ² − 1) / 2 − ln σ of each number of a frame's embedding."""
    average = sum(int(pixel) / 255 for pixel in frame.flat) / frame.size
    for gain, deviation in zip(GAINS, DEVIATIONS, strict=True):
        yield ((gain * average) ** 2 + deviation**2 - 1) / 2 - math.log(deviation)


@pytest.mark.parametrize("kl_weight", [0.0, 0.01, 3.0])
def test_the_loss_is_the_error_of_a_sampled_embedding_and_the_weighted_divergence(kl_weight: float) -> None:
    frames = some_frames()
    torch.manual_seed(5)
    losses = made(kl_weight=kl_weight)._losses((torch.from_numpy(frames),))
    torch.manual_seed(5)
    noise = torch.randn(len(frames), len(GAINS)).tolist()
    error = sum(map(squared_error, frames, noise)) / len(frames)
    kl = sum(sum(divergences(frame)) for frame in frames) / (len(frames) * len(GAINS))
    told = {name: loss.item() for name, loss in losses.items()}
    assert told == pytest.approx({"loss": error + kl_weight * kl, "reconstruction_loss": error, "kl_loss": kl})


def test_two_looks_at_the_same_frames_differ_in_the_sample_alone() -> None:
    trainer, frames = made(), torch.from_numpy(some_frames())
    torch.manual_seed(5)
    one, other = trainer._losses((frames,)), trainer._losses((frames,))
    assert one["reconstruction_loss"] != other["reconstruction_loss"]
    assert one["kl_loss"] == other["kl_loss"]


def lived(frames: np.ndarray[Any, Any]) -> RecordBatch:
    records = [Record(0, n, 0.0, 0.0, {}, {"observation": frame}) for n, frame in enumerate(frames)]
    return RecordBatch.stack("body", "a", records)


def test_the_error_on_fresh_frames_is_that_of_the_mean_embedding() -> None:
    trainer, frames = made(), some_frames()
    trainer.consume(lived(frames), continues=True)
    metrics = next(iter(trainer.train()))
    errors = [squared_error(frame, [0.0, 0.0]) for frame in frames]
    assert metrics["fresh_reconstruction_error"] == pytest.approx(sum(errors) / len(errors))


def test_the_first_step_under_a_heavy_divergence_goes_towards_the_standard_normal_distribution() -> None:
    trainer = made(kl_weight=100.0, learning_rate=0.01)
    trainer.consume(lived(some_frames()), continues=True)
    metrics = next(iter(trainer.train()))
    assert metrics["loss"] == pytest.approx(metrics["reconstruction_loss"] + 100.0 * metrics["kl_loss"])
    moved = {name: tensor.tolist() for name, tensor in trainer.published_models["image_encoder"].state_dict().items()}
    assert moved["gains"] == pytest.approx([0.49, -1.99]), "Adam's first step is as long as the learning rate"
    assert moved["deviations"] == pytest.approx([0.26, 1.49])
