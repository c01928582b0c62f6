"""The observation encoder and its decoder: a variational autoencoder (Kingma & Welling 2014) of camera frames.

Layer sizes are arguments; `configs/models/` holds the named sizes. Reference: 32-64-64 channels, embedding 512.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.2
MINIMUM_SIGMA = 1e-7
KERNELS = ((8, 4), (4, 2), (3, 1))


def to_float(observation: Tensor) -> Tensor:
    """Scale uint8 pixels to [0, 1] float32, at the input of a network; raise TypeError for other dtypes."""
    if observation.dtype != torch.uint8:
        raise TypeError(f"observation has dtype {observation.dtype}, expected uint8")
    return observation.float().div_(255.0)


def convolved_sizes(size: int) -> list[int]:
    """Edge length before each convolution and after the last."""
    sizes = [size]
    for kernel, stride in KERNELS:
        sizes.append((sizes[-1] - kernel) // stride + 1)
    if sizes[-1] < 1:
        raise ValueError(f"frames of {size} pixels are too small for this encoder: at least 36 are needed")
    return sizes


def _cut_off(sizes: Sequence[int], layer: int) -> int:
    """Return the number of pixels at the edge that a convolution's stride leaves out."""
    kernel, stride = KERNELS[layer]
    return sizes[layer] - ((sizes[layer + 1] - 1) * stride + kernel)


class ImageEncoder(nn.Module):
    """q(z | o): convolutions with batch norm, one linear layer, and two heads for mean and deviation.

    Attributes:
        embedding: Z, the size of z.
        observation_shape: (3, H, W) of a frame, uint8.
    """

    def __init__(self, height: int, width: int, channels: Sequence[int], hidden: int, embedding: int) -> None:
        """Build the layers.

        Args:
            height: of the frames, in pixels.
            width: of the frames, in pixels.
            channels: output channels of the three convolutions (k8 s4, k4 s2, k3 s1).
            hidden: size of the linear layer.
            embedding: Z, the size of z.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, (kernel, stride) in zip((3, *channels), channels, KERNELS, strict=False):
            layers += [nn.Conv2d(before, after, kernel, stride), nn.BatchNorm2d(after), nn.LeakyReLU(LEAK)]
        self.convolutions = nn.Sequential(*layers)
        flat = channels[-1] * convolved_sizes(height)[-1] * convolved_sizes(width)[-1]
        self.linear = nn.Sequential(nn.Linear(flat, hidden), nn.LeakyReLU(LEAK))
        self.mean_head = nn.Linear(hidden, embedding)
        self.deviation_head = nn.Linear(hidden, embedding)
        self.embedding = embedding
        self.observation_shape = (3, height, width)

    def _features(self, observation: Tensor) -> Tensor:
        features: Tensor = self.linear(self.convolutions(to_float(observation)).flatten(1))
        return features

    def forward(self, observation: Tensor) -> Tensor:
        """Return the mean embedding, (B, Z) float32, of frames (B, 3, H, W) uint8; bodies act on it."""
        mean: Tensor = self.mean_head(self._features(observation))
        return mean

    def posterior(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z | o), each (B, Z)."""
        features = self._features(observation)
        return self.mean_head(features), F.softplus(self.deviation_head(features)) + MINIMUM_SIGMA


class ImageDecoder(nn.Module):
    """p(o | z): one linear layer, the encoder's convolutions mirrored, and a learned bias per pixel.

    There is no further hidden linear layer: with one, size small learned more slowly in its first minute.
    """

    def __init__(self, height: int, width: int, channels: Sequence[int], embedding: int) -> None:
        """Build the layers; the arguments are those of the mirrored encoder, without `hidden`."""
        super().__init__()
        heights, widths = convolved_sizes(height), convolved_sizes(width)
        self._unflat = (channels[-1], heights[-1], widths[-1])
        flat = channels[-1] * heights[-1] * widths[-1]
        self.linear = nn.Sequential(nn.Linear(embedding, flat), nn.LeakyReLU(LEAK))
        layers: list[nn.Module] = []
        outs = (3, *channels)[:-1]
        for i in reversed(range(len(KERNELS))):
            kernel, stride = KERNELS[i]
            rest = (_cut_off(heights, i), _cut_off(widths, i))
            layers.append(nn.ConvTranspose2d(channels[i], outs[i], kernel, stride, output_padding=rest))
            if i:
                layers += [nn.BatchNorm2d(outs[i]), nn.LeakyReLU(LEAK)]
        self.convolutions = nn.Sequential(*layers)
        self.pixel_bias = nn.Parameter(torch.zeros(3, height, width))

    def forward(self, embedding: Tensor) -> Tensor:
        """Return frames (B, 3, H, W), float32 around [0, 1], of embeddings (B, Z)."""
        seen = self.linear(embedding).unflatten(1, self._unflat)
        frames: Tensor = self.convolutions(seen) + self.pixel_bias
        return frames


def reconstruction_loss(frames: Tensor, observation: Tensor) -> Tensor:
    """Mean squared error over all elements; both (B, 3, H, W), pixels in [0, 1]."""
    if frames.shape != observation.shape:
        raise ValueError(f"frames {tuple(frames.shape)} against observation {tuple(observation.shape)}")
    return F.mse_loss(frames, observation)


def kl_to_standard_normal(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL(N(μ, σ) ‖ N(0, 1)), mean over batch and latent; both (B, Z)."""
    if mean.shape != deviation.shape:
        raise ValueError(f"mean {tuple(mean.shape)} against deviation {tuple(deviation.shape)}")
    return (0.5 * (mean.square() + deviation.square() - 1.0) - deviation.log()).mean()
