"""A description of an experiment's models: layers, parameters, memory, bytes of a snapshot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ami_shared.config import build, trainer_service

TRAINED_COPIES = 5  # parameters, gradients, Adam's two moments, and the last good parameters


def names_in_use(config: DictConfig) -> set[str]:
    """Return the models that a trainer of the experiment publishes, or that its agent follows."""
    published = (trainer_service(config, name).publishes or config.models for name in config.trainers)
    return {*config.inference.agent.get("models", []), *itertools.chain(*published)}


def describe(models: Mapping[str, Any]) -> str:
    """Return a table of models, given their configuration; no memory is allocated for their parameters."""
    lines = [f"{'model and layers':<44} {'parameters':>14} {'snapshot':>10} {'training':>10}"]
    total = 0
    for name, section in models.items():
        if section is None or "_target_" not in section:
            continue
        with torch.device("meta"):
            model: nn.Module = build(section, f"models.{name}")
        total += _count(model)
        lines.append(_line(name, model))
        lines += [f"  {part}: {about}" for part, about in _layers(model)]
    lines.append(f"{'all':<44} {total:>14,}")
    lines.append("snapshot: bytes on the wire; training: parameters, gradients, Adam's moments and the last good")
    lines.append("parameters, without activations")
    return "\n".join(lines)


def _line(name: str, model: nn.Module) -> str:
    snapshot = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = TRAINED_COPIES * sum(p.numel() * p.element_size() for p in model.parameters())
    return f"{name:<44} {_count(model):>14,} {snapshot / 1e6:>7.1f} MB {trained / 1e6:>7.1f} MB"


def _layers(model: nn.Module) -> list[tuple[str, str]]:
    """Return name, class and number of parameters of every submodule with parameters of its own."""
    found = []
    for name, part in model.named_modules():
        own = sum(p.numel() for p in part.parameters(recurse=False))
        if own:
            told = part.extra_repr()
            found.append((name, f"{type(part).__name__}({told}) {own:,}"))
    return found


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
