from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ami_shared.errors import WireError
from ami_shared.models.replicas import Replicas
from ami_shared.snapshots import Snapshot


def snapshot(version: int, model: str = "encoder", value: float | None = None, **changed: Any) -> Snapshot:
    filled = float(version) if value is None else value
    arrays = {"weight": np.full((2, 3), filled, np.float32), "bias": np.full(2, filled, np.float32)}
    return Snapshot(model, version, time.time(), arrays | changed)


@pytest.fixture
def replicas() -> Replicas:
    return Replicas({"encoder": nn.Linear(3, 2), "policy": nn.Linear(3, 2)})


def value_of(replicas: Replicas, model: str = "encoder") -> float:
    values = {float(v) for parameter in replicas[model].parameters() for v in parameter.flatten()}
    assert len(values) == 1, "one generation"
    return values.pop()


def test_a_snapshot_is_used_from_the_next_swap_on(replicas: Replicas) -> None:
    assert replicas.versions == {"encoder": 0, "policy": 0}
    before = replicas["encoder"].weight.clone()
    assert replicas.offer(snapshot(3))
    assert torch.equal(replicas["encoder"].weight, before)
    assert replicas.versions["encoder"] == 0
    assert replicas.newest_versions() == {"encoder": 3, "policy": 0}
    assert replicas.swap()
    assert value_of(replicas) == 3.0
    assert replicas.versions == {"encoder": 3, "policy": 0}


@pytest.mark.parametrize("patient", [False, True])
def test_a_swap_waits_for_a_receiver_in_lockstep_alone(patient: bool) -> None:
    replicas = Replicas({"encoder": nn.Linear(3, 2)}, patient=patient)
    replicas.offer(snapshot(3))
    swapped: list[bool] = []
    with replicas._lock:
        stepping = threading.Thread(target=lambda: swapped.append(replicas.swap()))
        stepping.start()
        stepping.join(0.3 if patient else 30.0)
        assert swapped == ([] if patient else [False])
    stepping.join(30.0)
    assert swapped == [patient]
    replicas.swap()
    assert replicas.versions["encoder"] == 3


def test_without_news_a_swap_changes_nothing(replicas: Replicas) -> None:
    assert not replicas.swap()
    replicas.offer(snapshot(1))
    replicas.swap()
    module = replicas["encoder"]
    assert not replicas.swap()
    assert replicas["encoder"] is module


def test_all_models_swap_together(replicas: Replicas) -> None:
    replicas.offer(snapshot(1))
    replicas.offer(snapshot(7, model="policy"))
    replicas.swap()
    assert replicas.versions == {"encoder": 1, "policy": 7}
    assert (value_of(replicas), value_of(replicas, "policy")) == (1.0, 7.0)


def test_generations_follow_each_other_through_both_copies(replicas: Replicas) -> None:
    for version in (1, 2, 5, 6):
        replicas.offer(snapshot(version))
        replicas.swap()
        assert value_of(replicas) == version


def test_the_newest_before_a_swap_counts(replicas: Replicas) -> None:
    assert replicas.offer(snapshot(1))
    assert replicas.offer(snapshot(2))
    replicas.swap()
    assert value_of(replicas) == 2.0
    assert not replicas.swap()


@pytest.mark.parametrize("version", [4, 3, 0])
def test_an_older_or_equal_version_is_passed_over(replicas: Replicas, version: int) -> None:
    replicas.offer(snapshot(4))
    assert not replicas.offer(snapshot(version, value=99.0))
    replicas.swap()
    assert value_of(replicas) == 4.0
    assert not replicas.offer(snapshot(version, value=99.0))
    assert not replicas.swap()
    assert replicas.refused == 0
    assert replicas.outdated == (2 if version < 4 else 0), "an equal one is a repetition"


def test_a_model_that_nobody_uses_is_passed_over(replicas: Replicas) -> None:
    assert not replicas.offer(snapshot(1, model="stranger"))
    assert "stranger" not in replicas
    assert "encoder" in replicas


@pytest.mark.parametrize(
    "changed", [{"bias": np.zeros(3, np.float32)}, {"bias": np.zeros(2)}, {"more": np.zeros(1)}], ids=str
)
def test_a_misfit_is_refused_counted_and_changes_nothing(replicas: Replicas, changed: dict[str, Any]) -> None:
    replicas.offer(snapshot(1))
    replicas.swap()
    with pytest.raises(WireError):
        replicas.offer(snapshot(2, **changed))
    assert replicas.refused == 1
    assert not replicas.swap()
    assert value_of(replicas) == 1.0
    assert replicas.newest_versions()["encoder"] == 1


def test_a_misfit_does_not_spoil_the_good_one_before_it(replicas: Replicas) -> None:
    replicas.offer(snapshot(1))
    with pytest.raises(WireError):
        replicas.offer(snapshot(2, bias=np.zeros(3, np.float32)))
    assert replicas.newest_versions()["encoder"] == 1
    assert replicas.swap()
    assert value_of(replicas) == 1.0
    assert replicas.offer(snapshot(2))


def test_modules_are_in_evaluation_mode_and_need_no_gradient() -> None:
    replicas = Replicas({"encoder": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))})
    names = ("0.weight", "0.bias")
    for version in (1, 2):
        arrays = dict(zip(names, snapshot(version).arrays.values(), strict=True))
        replicas.offer(Snapshot("encoder", version, 0.0, arrays))
        replicas.swap()
        module = replicas["encoder"]
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_statistics_tell_version_and_age(replicas: Replicas) -> None:
    assert replicas.statistics()["encoder"] == {"version": 0, "age_s": None}
    replicas.offer(snapshot(3))
    replicas.swap()
    told = replicas.statistics()["encoder"]
    assert told["version"] == 3
    assert 0 <= told["age_s"] < 30


def test_no_step_ever_sees_two_generations_while_snapshots_pour_in() -> None:
    replicas = Replicas({name: nn.Linear(64, 64) for name in ("encoder", "policy")})
    ended = threading.Event()

    def pour() -> None:
        version = 0
        while not ended.is_set():
            version += 1
            for model in ("encoder", "policy"):
                arrays = {"weight": np.full((64, 64), version, np.float32), "bias": np.full(64, version, np.float32)}
                replicas.offer(Snapshot(model, version, 0.0, arrays))

    pouring = threading.Thread(target=pour)
    pouring.start()
    try:
        last, begin = 0, time.monotonic()
        while (lived_s := time.monotonic() - begin) < 1.0 or (last <= 5 and lived_s < 30.0):
            replicas.swap()
            version = replicas.versions["encoder"]
            assert version >= last
            last = version
            if version:
                assert value_of(replicas) == version
    finally:
        ended.set()
        pouring.join(30)
    assert last > 5


def test_lasting_arrays_are_used_where_they_are_and_never_written_to(replicas: Replicas) -> None:
    lent = [replace(snapshot(version), lasting=True) for version in (1, 2, 3)]
    for given in lent:
        replicas.offer(given)
        replicas.swap()
        assert value_of(replicas) == given.version
        assert np.shares_memory(replicas["encoder"].weight.numpy(), given.arrays["weight"])
    for version in (4, 5, 6, 7):
        replicas.offer(snapshot(version))
        replicas.swap()
        assert value_of(replicas) == version
    for given in lent:
        assert {float(v) for array in given.arrays.values() for v in array.flatten()} == {float(given.version)}


def test_a_misfit_after_lasting_arrays_changes_nothing(replicas: Replicas) -> None:
    replicas.offer(replace(snapshot(1), lasting=True))
    with pytest.raises(WireError):
        replicas.offer(snapshot(2, bias=np.zeros(3, np.float32)))
    assert replicas.swap()
    assert value_of(replicas) == 1.0
