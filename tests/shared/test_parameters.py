from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ami_shared.errors import WireError
from ami_shared.models.parameters import all_finite, copy_state, layout_of, read_arrays, write_arrays
from ami_shared.wire import Array


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    made(torch.randn(8, 3, 4, 4))  # so that the running statistics are not those of a fresh model
    return made


def state(module: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_parameters_and_running_statistics_arrive_in_another_model() -> None:
    teacher, pupil = model(0), model(1)
    assert not same(state(teacher), state(pupil))
    write_arrays(pupil, read_arrays(teacher))
    assert same(state(teacher), state(pupil))
    assert "1.running_mean" in state(pupil)


def test_what_was_read_does_not_change_with_the_model() -> None:
    module = model(0)
    arrays = read_arrays(module)
    before = {name: array.copy() for name, array in arrays.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert same(arrays, before)


def test_a_state_is_copied_to_one_piece_of_memory() -> None:
    module = model(0)
    layout = layout_of(module)
    arrays = layout.arrays(np.zeros(layout.nbytes, np.uint8))
    copy_state(module, arrays)
    assert same(arrays, state(module))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(value: float, dtype: type) -> None:
    arrays = {"count": np.array(7), "large": np.full((3, 1 << 18), 6e4, dtype), "scalar": np.array(1, dtype)}
    assert all_finite(arrays)
    for where in (0, 1 << 18, -1):
        spoilt = arrays["large"].copy()
        spoilt.reshape(-1)[where] = value
        assert not all_finite(arrays | {"large": spoilt})
    assert not all_finite(arrays | {"scalar": np.array(value, dtype)})


def test_written_parameters_do_not_share_memory_with_the_message() -> None:
    module, arrays = model(0), read_arrays(model(1))
    write_arrays(module, arrays)
    arrays["3.bias"] += 1.0
    assert not np.array_equal(state(module)["3.bias"], arrays["3.bias"])


def test_read_only_arrays_can_be_written() -> None:
    arrays = read_arrays(model(1))
    for array in arrays.values():
        array.flags.writeable = False
    module = model(0)
    write_arrays(module, arrays)
    assert same(state(module), arrays)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("3.bias"),
        lambda a: a.update({"3.more": np.zeros(1, np.float32)}),
        lambda a: a.update({"3.bias": np.zeros(3, np.float32)}),
        lambda a: a.update({"3.bias": np.zeros((2, 1), np.float32)}),
        lambda a: a.update({"3.bias": np.zeros(2, np.float64)}),
        lambda a: a.update({"3.bias": np.zeros(2, np.int32)}),
    ],
    ids=["absent", "too many", "too long", "another shape", "double", "whole numbers"],
)
def test_what_does_not_fit_is_refused_and_the_model_untouched(change: Any) -> None:
    module, arrays = model(0), read_arrays(model(1))
    before = state(module)
    change(arrays)
    with pytest.raises(WireError, match="3"):
        write_arrays(module, arrays)
    assert same(state(module), before)


def test_parameters_stay_trainable() -> None:
    module = model(0)
    write_arrays(module, read_arrays(model(1)))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in module.parameters())
