from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_shared import wire
from ami_shared.errors import WireError
from ami_shared.shared_memory import Reference
from ami_shared.snapshots import Layout, Notice, Snapshot, topic
from ami_shared.wire import Message

ARRAYS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7, np.int64)}


def message(**fields: Any) -> Message:
    sealed = Snapshot("encoder", 3, 12.5, ARRAYS).to_message("trainer", "inc")
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
    at = frames[1].find(ARRAYS["weight"].tobytes()) + bit // 8
    frames[1][at] ^= 1 << bit % 8
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
    [
        {"version": -1},
        {"version": 1 << 62},
        {"version": "3"},
        {"model": 5},
        {"created": "now"},
        {"digest": None},
        {"part": [1, 1]},
        {"part": [0, 0]},
        {"part": [-1, 2]},
        {"part": [True, 2]},
        {"part": 3},
        {"part": [0, 1 << 40]},
    ],
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


def test_bfloat16_is_the_nearest_of_eight_significant_bits() -> None:
    values = np.array([0.0, -0.0, 1.0, 1.005, 1.00390625, 1.01171875, -3.1415927, 1e-40, 3.0e38], np.float32)
    sent = Snapshot("encoder", 3, 1.0, {"weight": values, "steps": ARRAYS["steps"]}).to_message("t", "i", halved=True)
    assert sent.arrays["weight"].nbytes == 2 * len(values)
    got = through_the_wire(sent).arrays
    np.testing.assert_allclose(got["weight"], values, rtol=2**-8, atol=1e-40)
    assert got["weight"][4] == 1.0, "ties go to the even one"
    assert got["weight"][5] == 1.015625
    assert np.signbit(got["weight"][1])
    np.testing.assert_array_equal(got["steps"], ARRAYS["steps"])


def test_bfloat16_keeps_what_is_finite_finite_and_loses_nothing_when_sent_on() -> None:
    values = np.array([1.1, *(sign * np.finfo(np.float32).max for sign in (1, -1))], np.float32)
    came = through_the_wire(Snapshot("encoder", 3, 1.0, {"weight": values}).to_message("t", "i", halved=True))
    assert came.halved
    assert np.isfinite(came.arrays["weight"]).all()
    assert (np.abs(came.arrays["weight"][1:]) > 3.3e38).all()
    once_more = through_the_wire(came.to_message("t", "i", halved=True)).arrays["weight"]
    np.testing.assert_array_equal(once_more, came.arrays["weight"])


@pytest.mark.parametrize("names", [["steps"], ["absent"], [3], "weight", 7])
def test_what_cannot_be_bfloat16_is_a_wire_error(names: object) -> None:
    with pytest.raises(WireError):
        through_the_wire(message(bfloat16=names))


def test_an_array_is_widened_once() -> None:
    sent = Snapshot("encoder", 3, 1.0, {"weight": np.ones(4, np.float32)}).to_message("t", "i", halved=True)
    with pytest.raises(WireError, match="bfloat16"):
        through_the_wire(replace(sent, fields={**sent.fields, "bfloat16": ["weight", "weight"]}))


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(["float32", "float64", "int64", "uint8"]), st.integers(0, 100)), min_size=1
    ),
    least=st.integers(1, 600),
)
def test_the_stretches_of_a_layout_are_all_its_numbers(kinds: list[tuple[str, int]], least: int) -> None:
    layout = Layout.of({str(n): (dtype, (size,)) for n, (dtype, size) in enumerate(kinds[:40])})
    content = np.zeros(layout.nbytes, np.uint8)
    arrays = list(layout.arrays(content).values())
    for n, array in enumerate(arrays, 1):
        array.fill(n)
    done = 0
    for count, numbers in layout.stretches(content, least):
        stretch = arrays[done:count]
        assert {array.dtype for array in stretch} == {numbers.dtype}
        assert numbers[numbers != 0].tolist() == [n for n in range(done + 1, count + 1) for _ in arrays[n - 1]]
        assert sum(array.nbytes for array in stretch[:-1]) < least
        done = count
    assert done == len(arrays)


NOTICE = Notice(
    "encoder", 3, 1.5, Reference(12, 3, bytes(16), 4, 192), Layout.of({"w": ("float32", (2, 3)), "n": ("int64", ())})
)


def test_a_notice_arrives_as_it_was_sent() -> None:
    sent = wire.decode([bytes(frame) for frame in wire.encode(NOTICE.to_message("trainer", "inc"))])
    assert Notice.from_message(sent) == replace(NOTICE, layout=Layout(NOTICE.layout.entries, 192))
    without = replace(NOTICE, reference=None, layout=Layout((), 0))
    assert Notice.from_message(without.to_message("trainer", "inc")) == without


def test_arrays_lie_aligned_in_memory_and_are_views_of_it() -> None:
    assert [entry[3] for entry in NOTICE.layout.entries] == [0, 64]
    memory = np.zeros(NOTICE.layout.nbytes, np.uint8)
    arrays = NOTICE.layout.arrays(memory)
    arrays["n"][...] = 258
    assert memory[64:66].tolist() == [2, 1]
    assert arrays["w"].shape == (2, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"memory": [1, 2, 3]},
        {"memory": 5},
        {"layout": [["w", "float32", [2, 3], 192]]},
        {"layout": [["w", "float32", [1 << 40, 1 << 40], 0]]},
        {"layout": [["w", "float32", [0, 1 << 47, 1 << 47], 0]]},
        {"layout": [["w", "object", [1], 0]]},
        {"layout": [["w", "float32", [-1], 0]]},
        {"layout": [["w", "float32", [1], 3]]},
        {"layout": None},
        {"version": -1},
    ],
    ids=str,
)
def test_a_malformed_notice_is_a_wire_error(fields: dict[str, Any]) -> None:
    sent = NOTICE.to_message("trainer", "inc")
    with pytest.raises(WireError):
        Notice.from_message(replace(sent, fields={**sent.fields, **fields}))


def test_parts_hold_whole_arrays_and_none_can_be_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ami_shared.limits.SNAPSHOT_PART_BYTES", 64)
    arrays = {f"w{n}": np.full(size, n, np.float32) for n, size in enumerate((4, 8, 8, 100, 1, 1))}
    parts = list(Snapshot("encoder", 3, 1.0, arrays).to_parts("t", "i"))
    assert [list(part.arrays) for part in parts] == [["w0", "w1"], ["w2"], ["w3"], ["w4", "w5"]]
    assert [through_the_wire(part).version for part in parts] == [3] * 4
    moved = replace(parts[1], fields={**parts[1].fields, "part": [2, 4]})
    with pytest.raises(WireError, match="digest"):
        through_the_wire(moved)


def test_a_small_snapshot_is_one_message_as_ever() -> None:
    (only,) = Snapshot("encoder", 3, 12.5, ARRAYS).to_parts("trainer", "inc")
    assert only.fields == message().fields
