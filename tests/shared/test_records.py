from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ami_shared import wire
from ami_shared.errors import WireError
from ami_shared.records import Record, RecordBatch, topic
from ami_shared.wire import Message


def record(sequence: int, segment: int = 0) -> Record:
    data = {"observation": np.full((3, 2, 2), sequence, np.uint8), "action": np.array([sequence, 1], np.int64)}
    return Record(segment, sequence, 100.0 + sequence, 0.25, {"image_encoder": sequence // 2}, data)


def batch(first: int = 4, count: int = 3) -> RecordBatch:
    return RecordBatch.stack("body", "inc", [record(n, segment=n % 2) for n in range(first, first + count)])


def through_the_wire(message: Message) -> RecordBatch:
    return RecordBatch.from_message(wire.decode([bytes(frame) for frame in wire.encode(message)]))


def test_stacking_puts_records_side_by_side() -> None:
    stacked = batch()
    assert (stacked.body, stacked.incarnation, stacked.first_sequence, len(stacked)) == ("body", "inc", 4, 3)
    assert stacked.segments.tolist() == [0, 1, 0]
    assert stacked.times.tolist() == [104.0, 105.0, 106.0]
    assert stacked.latenesses_s.tolist() == [0.25] * 3
    assert stacked.versions["image_encoder"].tolist() == [2, 2, 3]
    assert stacked.data["observation"].shape == (3, 3, 2, 2)
    assert stacked.data["observation"].dtype == np.uint8
    assert stacked.data["action"].tolist() == [[4, 1], [5, 1], [6, 1]]


def test_values_of_several_dtypes_are_stacked_as_one_that_holds_them_all() -> None:
    values = [np.int8(3), np.array(300), np.array(0.5)]
    records = [Record(0, n, 0.0, 0.0, {}, {"x": np.asarray(value)}) for n, value in enumerate(values)]
    assert RecordBatch.stack("body", "inc", records).data["x"].tolist() == [3.0, 300.0, 0.5]


def test_a_batch_arrives_as_it_was_sent() -> None:
    sent = batch()
    got = through_the_wire(sent.to_message())
    assert (got.body, got.incarnation, got.first_sequence) == ("body", "inc", 4)
    for a, b in ((got.segments, sent.segments), (got.times, sent.times), (got.latenesses_s, sent.latenesses_s)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert list(got.versions) == ["image_encoder"]
    np.testing.assert_array_equal(got.versions["image_encoder"], sent.versions["image_encoder"])
    assert sorted(got.data) == ["action", "observation"]
    for name in sent.data:
        assert got.data[name].dtype == sent.data[name].dtype
        np.testing.assert_array_equal(got.data[name], sent.data[name])


def test_a_tail_is_the_batch_without_its_first_records() -> None:
    tail = batch().tail(2)
    assert (tail.first_sequence, len(tail)) == (6, 1)
    assert tail.segments.tolist() == [0]
    assert tail.times.tolist() == [106.0]
    assert len(tail.latenesses_s) == 1
    assert tail.versions["image_encoder"].tolist() == [3]
    assert tail.data["action"].tolist() == [[6, 1]]


def test_the_topic_names_the_body() -> None:
    assert batch().to_message().topic == b"experience/body/"
    assert not topic("body2").startswith(topic("body"))


def changed(arrays: dict[str, Any] | None = None, fields: dict[str, Any] | None = None, drop: str = "") -> Message:
    message = batch().to_message()
    kept = {name: column for name, column in message.arrays.items() if name != drop}
    return replace(message, arrays=kept | (arrays or {}), fields={**message.fields, **(fields or {})})


MALFORMED: dict[str, Callable[[], Message]] = {
    "another kind of message": lambda: replace(changed(), kind="snapshot"),
    "no first": lambda: replace(changed(), fields={}),
    "negative first": lambda: changed(fields={"first": -1}),
    "giant first": lambda: changed(fields={"first": 1 << 62}),
    "first is true": lambda: changed(fields={"first": True}),
    "no segments": lambda: changed(drop="segment"),
    "no times": lambda: changed(drop="time"),
    "no latenesses": lambda: changed(drop="lateness"),
    "segments of floats": lambda: changed({"segment": np.zeros(3)}),
    "segments of two axes": lambda: changed({"segment": np.zeros((3, 1), np.int64)}),
    "too few times": lambda: changed({"time": np.zeros(2)}),
    "endless time": lambda: changed({"time": np.array([1.0, np.inf, 2.0])}),
    "no time": lambda: changed({"time": np.array([1.0, np.nan, 2.0])}),
    "too long data": lambda: changed({"data/action": np.zeros((4, 2), np.int64)}),
    "scalar data": lambda: changed({"data/action": np.array(1)}),
    "too long versions": lambda: changed({"version/image_encoder": np.zeros(4, np.int64)}),
    "versions of floats": lambda: changed({"version/image_encoder": np.zeros(3)}),
    "versions of two axes": lambda: changed({"version/image_encoder": np.zeros((3, 2), np.int64)}),
    "nothing at all": lambda: batch().tail(3).to_message(),
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_batch_is_a_wire_error(make: Callable[[], Message]) -> None:
    with pytest.raises(WireError):
        through_the_wire(make())


def test_the_unchanged_message_passes() -> None:
    assert len(through_the_wire(changed())) == 3
