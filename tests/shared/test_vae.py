from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ami_shared.config import build, load_config
from ami_shared.models.vae import (
    ImageDecoder,
    ImageEncoder,
    kl_to_standard_normal,
    reconstruction_loss,
    to_float,
)


def frames(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(84, 84), (36, 36), (37, 41), (60, 96), (96, 61), (120, 160)])
def test_encoder_and_decoder_keep_every_size(height: int, width: int) -> None:
    encoder = ImageEncoder(height, width, (4, 5, 6), 7, 8)
    decoder = ImageDecoder(height, width, (4, 5, 6), 8)
    observation = frames(2, height, width)
    mean, deviation = encoder.posterior(observation)
    assert mean.shape == deviation.shape == (2, 8)
    assert (deviation > 0).all()
    assert encoder.embedding == 8
    assert decoder(mean).shape == observation.shape


@pytest.mark.parametrize(("height", "width"), [(35, 84), (84, 35), (1, 1)])
def test_frames_that_are_too_small_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="too small"):
        ImageEncoder(height, width, (4, 5, 6), 7, 8)
    with pytest.raises(ValueError, match="too small"):
        ImageDecoder(height, width, (4, 5, 6), 8)


def test_the_reference_encoder_has_the_published_layers_and_size(configs: Path) -> None:
    encoder = build(load_config(["models=reference"]).models.image_encoder, "models.image_encoder")
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (3, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1),
    ]  # fmt: skip
    assert encoder.linear[0].in_features == 3136
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(2.2e6, rel=0.02)


@pytest.mark.parametrize("size", ["tiny", "small", "large"])
def test_the_sizes_are_ordered_by_their_names(size: str, configs: Path) -> None:
    config = load_config([f"models={size}"]).models
    with torch.device("meta"):
        count = sum(p.numel() for p in build(config.image_encoder, "encoder").parameters())
    bounds = {"tiny": (1e4, 2e5), "small": (5e5, 1e6), "large": (3e7, 1e8)}
    assert bounds[size][0] < count < bounds[size][1]


def test_acting_is_deterministic_and_does_not_depend_on_the_batch() -> None:
    encoder = ImageEncoder(40, 40, (4, 5, 6), 7, 8).eval()
    observation = frames(4, 40, 40)
    with torch.inference_mode():
        together = encoder(observation)
        assert torch.equal(together, encoder(observation))
        assert torch.allclose(together[1:2], encoder(observation[1:2]), atol=1e-5)
        assert torch.equal(together, encoder.posterior(observation)[0])


def test_only_pixels_of_eight_bits_are_taken() -> None:
    encoder = ImageEncoder(36, 36, (4, 5, 6), 7, 8)
    with pytest.raises(TypeError, match="uint8"):
        encoder(torch.zeros(1, 3, 36, 36))


def test_pixels_are_scaled_to_one() -> None:
    scaled = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_the_divergence_is_that_worked_by_hand() -> None:
    mean, deviation = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    # 0 for the standard normal itself; ½(1 + 4 − 1) − ln 2 for N(1, 2)
    assert kl_to_standard_normal(mean, deviation).item() == pytest.approx((0.0 + 2.0 - math.log(2.0)) / 2)


def test_the_divergence_agrees_with_torch() -> None:
    mean, deviation = torch.randn(5, 3), torch.rand(5, 3) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    ).mean()
    assert kl_to_standard_normal(mean, deviation).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_reconstruction_error_is_that_worked_by_hand() -> None:
    seen = torch.zeros(2, 3, 1, 2)
    made = torch.zeros(2, 3, 1, 2)
    made[0, 0, 0, 0], made[1, 2, 0, 1] = 3.0, -1.0
    assert reconstruction_loss(made, seen).item() == pytest.approx(10.0 / 12.0)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="against"):
        reconstruction_loss(torch.zeros(4, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="against"):
        kl_to_standard_normal(torch.zeros(4, 8), torch.zeros(4, 1))


def test_the_learned_pixel_bias_is_part_of_every_picture() -> None:
    decoder = ImageDecoder(36, 40, (4, 5, 6), 8).eval()
    embedding = torch.zeros(1, 8)
    with torch.no_grad():
        before = decoder(embedding)
        decoder.pixel_bias[1, 2, 3] += 5.0
        difference = decoder(embedding) - before
    assert difference[0, 1, 2, 3].item() == pytest.approx(5.0, abs=1e-4)
    assert difference.abs().sum().item() == pytest.approx(5.0, abs=1e-3)
