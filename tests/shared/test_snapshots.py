from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ami_shared import wire
from ami_shared.errors import WireError
from ami_shared.snapshots import Snapshot, topic
from ami_shared.wire import Message

ARRAYS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7, np.int64)}


def message(**fields: Any) -> Message:
    sealed = Snapshot.seal("encoder", 3, 12.5, ARRAYS).to_message("trainer", "inc")
    return replace(sealed, fields={**sealed.fields, **fields})


def through_the_wire(sent: Message) -> Snapshot:
    return Snapshot.from_message(wire.decode([bytes(frame) for frame in wire.encode(sent)]))


def test_a_snapshot_arrives_as_it_was_sealed() -> None:
    got = through_the_wire(message())
    assert (got.model, got.version, got.created) == ("encoder", 3, 12.5)
    assert list(got.arrays) == ["weight", "steps"]
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(got.arrays[name], array)
        assert got.arrays[name].shape == array.shape
    assert got.nbytes == 6 * 4 + 8


@pytest.mark.parametrize("bit", [0, 7, 100, 191])
def test_one_flipped_bit_is_noticed(bit: int) -> None:
    frames = [bytearray(frame) for frame in wire.encode(message())]
    frames[2][bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError, match="digest"):
        Snapshot.from_message(wire.decode([bytes(frame) for frame in frames]))


@pytest.mark.parametrize("fields", [{"version": 4}, {"model": "decoder"}, {"digest": 5}])
def test_a_changed_identity_is_noticed(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="digest"):
        through_the_wire(message(**fields))


@pytest.mark.parametrize(
    "arrays",
    [
        {"weights": ARRAYS["weight"], "steps": ARRAYS["steps"]},
        {"weight": ARRAYS["weight"].reshape(3, 2), "steps": ARRAYS["steps"]},
        {"weight": ARRAYS["weight"].view(np.int32), "steps": ARRAYS["steps"]},
        {"steps": ARRAYS["steps"], "weight": ARRAYS["weight"]},
        {"weight": ARRAYS["weight"]},
    ],
    ids=["renamed", "reshaped", "retyped", "reordered", "left out"],
)
def test_a_changed_layout_is_noticed(arrays: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="digest"):
        through_the_wire(replace(message(), arrays=arrays))


@pytest.mark.parametrize(
    "fields",
    [{"version": -1}, {"version": 1 << 62}, {"version": "3"}, {"model": 5}, {"created": "now"}, {"digest": None}],
    ids=str,
)
def test_a_malformed_field_is_a_wire_error(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        through_the_wire(message(**fields))


def test_another_message_on_the_parameter_stream_is_a_wire_error() -> None:
    with pytest.raises(WireError, match="records"):
        Snapshot.from_message(replace(message(), kind="records"))


def test_the_topic_of_one_model_is_no_prefix_of_another() -> None:
    assert not topic("encoder2").startswith(topic("encoder"))
    assert message().topic == topic("encoder")
