from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ami_shared.errors import ConfigurationError
from ami_trainer.compute import Compute
from ami_trainer.settings import check_counts, check_numbers


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", None, 1.5])
def test_a_device_that_is_not_here_is_refused_in_one_line(device: Any) -> None:
    with pytest.raises(ConfigurationError, match="device=") as caught:
        Compute(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["float16", "bf16", "", None])
def test_an_unknown_precision_is_refused(precision: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"precision=.* must be one of float32, bfloat16"):
        Compute("cpu", precision)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_linear_layers_compute_in_the_precision_given_and_parameters_stay_float32(
    precision: str, dtype: torch.dtype
) -> None:
    compute = Compute("cpu", precision)
    layer = compute.place(nn.Linear(3, 2))
    with compute.autocast():
        made = layer(compute.tensor(np.ones((4, 3), np.float32)))
    assert made.dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning:torch")  # of its own parts, which the compiler imports
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
def test_a_compiled_model_computes_the_same_under_the_same_names() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    x, expected, names = torch.randn(5, 3), None, list(plain.state_dict())
    expected = plain(x)
    compiled = Compute("cpu", compile=True).place(plain)
    torch.testing.assert_close(compiled(x), expected)
    assert list(compiled.state_dict()) == names


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_a_count_is_a_whole_number_from_one_on(value: Any) -> None:
    check_counts(epochs=1)
    with pytest.raises(ConfigurationError, match=r"epochs=.* whole number"):
        check_counts(epochs=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5", None])
def test_a_number_is_finite_and_within_its_limits(value: Any) -> None:
    check_numbers(most=1.0, discount=0, decay=1.0)
    with pytest.raises(ConfigurationError, match=r"discount=.* from 0 to 1"):
        check_numbers(most=1.0, discount=value)


def test_a_number_without_a_limit_must_be_finite_all_the_same() -> None:
    with pytest.raises(ConfigurationError, match="learning_rate=inf"):
        check_numbers(learning_rate=float("inf"))
