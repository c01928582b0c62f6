"""Copies that another thread looks at from right behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

from ami_shared.models.parameters import layout_of
from ami_trainer import copying
from ami_trainer.copying import Copying

LAYERS = 6


def copying_of(module: nn.Module) -> Copying:
    layout = layout_of(module)
    return Copying(layout, np.zeros(layout.nbytes, np.uint8))


@pytest.fixture
def module() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(LAYERS)))


@pytest.mark.parametrize("follows", [True, False], ids=["behind", "afterwards"])
@pytest.mark.parametrize("spoilt", [None, 0, LAYERS - 1])
def test_whatever_is_not_finite_is_seen(
    module: nn.Sequential, follows: bool, spoilt: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "FOLLOWED_BYTES", 4_000)
    if spoilt is not None:
        with torch.no_grad():
            module[spoilt].bias[7] = torch.nan  # type: ignore[index]
    copy, seen = copying_of(module), list[bool]()
    follower = threading.Thread(target=lambda: seen.append(copy.finite()))
    if follows:
        follower.start()
    copy.make(module)
    if not follows:
        follower.start()
    follower.join(10.0)
    assert seen == [spoilt is None]
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(copy.arrays[name], tensor.numpy())


def test_nothing_is_looked_at_before_it_is_there(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is used again may hold what was not finite before."""
    monkeypatch.setattr(copying, "FOLLOWED_BYTES", 1)
    copy, seen = copying_of(module), list[bool]()
    for array in copy.arrays.values():
        array.fill(np.nan)
    follower = threading.Thread(target=lambda: seen.append(copy.finite()))
    follower.start()
    follower.join(0.2)
    assert follower.is_alive()
    copy.make(module)
    follower.join(10.0)
    assert seen == [True]


def test_a_copy_that_breaks_keeps_nobody_waiting(module: nn.Module) -> None:
    copy = copying_of(nn.Linear(3, 3))
    with pytest.raises(KeyError):
        copy.make(module)
    follower = threading.Thread(target=copy.finite, daemon=True)
    follower.start()
    follower.join(10.0)
    assert not follower.is_alive()


def test_only_large_copies_are_followed(module: nn.Module) -> None:
    assert not copying_of(module).worth_following
    assert copying_of(nn.Linear(2_048, 2_048)).worth_following
