"""Models on a GPU; what needs one is skipped where there is none."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ami_shared.errors import AmiError, ConfigurationError
from ami_shared.models.device import device_of, pinned_for, told_when_full, usable_device
from ami_shared.models.parameters import copy_state, layout_of, read_arrays
from ami_shared.models.replicas import Replicas
from ami_shared.shared_memory import Pool
from ami_shared.snapshots import Snapshot

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", None, 1.5])
def test_a_device_that_is_not_here_is_refused_in_one_line(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^inference.device=.* cannot be used here \(") as caught:
        usable_device(name, "inference.device")
    assert "\n" not in str(caught.value)


def test_modules_tell_where_they_are() -> None:
    assert device_of() == device_of(nn.ReLU(), nn.Linear(1, 1)) == torch.device("cpu")
    assert device_of(nn.ReLU(), nn.Linear(1, 1, device="meta")) == torch.device("meta")


def test_a_gpu_s_full_memory_is_one_line_that_says_what_to_do() -> None:
    told = "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
    why = r"memory is full \(CUDA out of memory\. Tried to allocate 9\.00 GiB\): make it smaller, or use the GPU"
    with pytest.raises(AmiError, match=why), told_when_full("make it smaller"):
        raise torch.OutOfMemoryError(told)


@on_gpu
def test_parameters_get_from_a_gpu_into_locked_memory_and_back() -> None:
    module = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200)).cuda()
    pool = Pool(layout_of(module).nbytes, pinned_for(device_of(module)))
    piece = pool.take()
    arrays = layout_of(module).arrays(piece.content)
    copy_state(module, arrays)
    assert torch.from_numpy(piece.content).is_pinned()
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(arrays[name], tensor.cpu().numpy())


@on_gpu
@pytest.mark.parametrize("lasting", [False, True])
def test_a_snapshot_is_used_whole_on_a_gpu_while_steps_go_on(lasting: bool) -> None:
    """Values that fill a module tell of which generation each of its numbers is."""
    size = 3_000  # more than one piece of the way
    replicas = Replicas({"model": nn.Linear(size, size).cuda()})
    x = torch.ones(1, size, device="cuda")
    for version in range(1, 6):
        arrays = {"weight": np.full((size, size), version, np.float32), "bias": np.zeros(size, np.float32)}
        assert replicas.offer(Snapshot("model", version, time.time(), arrays, lasting))
        arrays["weight"][:] = 0.0  # a GPU's copy is its own
        queued = [replicas["model"](x) for _ in range(20)]  # with the generation before, not yet computed
        replicas.swap()
        after = replicas["model"](x)
        assert torch.stack(queued[1:]).eq(queued[0]).all()
        assert after.eq(size * version).all()
    assert read_arrays(replicas["model"])["weight"].max() == 5.0
