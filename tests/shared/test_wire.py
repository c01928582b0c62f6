"""The wire format: what is sent arrives, and what nobody would send is refused, whatever it is."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ami_shared import limits, wire
from ami_shared.errors import WireError
from ami_shared.wire import ALLOWED_DTYPES, Message, typed

HEADER = {"v": 1, "type": "test", "from": "body", "inc": "1", "fields": {}, "arrays": []}


def header(**changed: Any) -> bytes:
    packed: bytes = msgpack.packb(HEADER | changed)
    return packed


def one_array(name: Any, dtype: Any, shape: Any, buffer: bytes) -> list[bytes]:
    return [b"", header(arrays=[[name, dtype, shape]]), buffer]


def through_the_wire(message: Message) -> Message:
    return wire.decode([bytes(frame) for frame in wire.encode(message)])


@pytest.mark.parametrize("dtype", ALLOWED_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_an_array_arrives_with_its_dtype_shape_and_values(dtype: str, shape: tuple[int, ...]) -> None:
    sent = (np.arange(np.prod(shape, dtype=int)) % 2 * 3).reshape(shape).astype(dtype)
    got = through_the_wire(Message("test", "body", "1", {}, {"x": sent})).arrays["x"]
    assert got.dtype == sent.dtype
    assert got.shape == sent.shape
    np.testing.assert_array_equal(got, sent)


def test_fields_names_and_topic_arrive() -> None:
    fields = {"a": 1, "b": 2.5, "c": "ü", "d": [1, [2]], "e": {"f": None}, "g": True, "h": b"\x00\xff"}
    got = through_the_wire(Message("kind", "sender", "inc", fields, topic=b"topic/x"))
    assert (got.kind, got.sender, got.incarnation, got.fields, got.topic) == (
        "kind", "sender", "inc", fields, b"topic/x",
    )  # fmt: skip


def test_a_strided_array_arrives_in_its_own_order() -> None:
    sent = np.arange(24).reshape(4, 6).T[::2]
    np.testing.assert_array_equal(through_the_wire(Message("t", "b", "1", {}, {"x": sent})).arrays["x"], sent)


def test_a_big_endian_array_arrives_with_its_values() -> None:
    sent = np.array([1.0, -2.5, 1e9], ">f4")
    np.testing.assert_array_equal(through_the_wire(Message("t", "b", "1", {}, {"x": sent})).arrays["x"], sent)


def test_numbers_of_numpy_arrive_as_plain_ones() -> None:
    fields = {"a": np.float32(0.5), "b": [np.int64(7)], "c": np.bool_(True)}
    assert through_the_wire(Message("t", "b", "1", fields)).fields == {"a": 0.5, "b": [7], "c": True}


@pytest.mark.parametrize("value", [object(), {1, 2}, 1 << 64, "\ud800", np.zeros(2)], ids=lambda v: type(v).__name__)
def test_a_field_of_another_type_is_never_sent(value: Any) -> None:
    with pytest.raises(WireError, match=r"t: .*not sent"):
        wire.encode(Message("t", "b", "1", {"x": value}))


def test_decoded_arrays_cannot_be_written_to() -> None:
    got = through_the_wire(Message("t", "b", "1", {}, {"x": np.zeros(3)})).arrays["x"]
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 1


def test_a_contiguous_array_is_sent_without_a_copy() -> None:
    sent = np.zeros(wire.SMALL + 1, np.uint8)
    buffer = wire.encode(Message("t", "b", "1", {}, {"x": sent}))[2]
    sent[0] = 7
    assert buffer[0] == 7


@pytest.mark.parametrize(
    "array",
    [np.array([object()]), np.array(["text"]), np.zeros(2, "datetime64[s]"), np.zeros(2, "f4,i4"), np.zeros(2, "S3")],
)
def test_an_array_of_another_kind_is_never_sent(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(WireError, match="not sent"):
        wire.encode(Message("t", "b", "1", {}, {"x": array}))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_frames_are_refused(count: int) -> None:
    with pytest.raises(WireError, match="frames"):
        wire.decode([b""] * count)


def test_too_many_frames_are_refused() -> None:
    with pytest.raises(WireError, match="frames"):
        wire.decode([b""] * (3 + limits.MAX_ARRAYS))


@pytest.mark.parametrize("version", [0, 3, None, "1", True, 1.0, [[1]], {}])
def test_another_protocol_version_is_refused(version: Any) -> None:
    with pytest.raises(WireError, match="protocol version"):
        wire.decode([b"", header(v=version)])


def test_too_long_a_header_is_refused_unread() -> None:
    with pytest.raises(WireError, match="limit"):
        wire.decode([b"", b"\xc1" * (limits.MAX_HEADER_BYTES + 1)])


@pytest.mark.parametrize("depth", [limits.MAX_NESTING + 1, 500, 990, 1_000, 1_015, 5_000, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k"], ids=["list", "map"])
def test_deep_nesting_is_refused_before_it_exhausts_a_stack(depth: int, opening: bytes) -> None:
    plain = msgpack.packb({k: v for k, v in HEADER.items() if k != "v"})
    raw = bytes([plain[0] + 1]) + plain[1:] + msgpack.packb("v") + opening * depth + b"\x90"
    with pytest.raises(WireError):
        wire.decode([b"", raw])


def test_lists_that_claim_more_items_than_there_are_bytes_take_no_memory() -> None:
    claims = b"\xdc\xff\xff" * 1_000  # each a list of 65,535 items, the first of which is the next list
    tracemalloc.start()
    with pytest.raises(WireError):
        wire.decode([b"", claims])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 << 20, "and not half a gigabyte"


@pytest.mark.parametrize("fields", [{b"x": 1}, {"x": {b"y": 1}}, {"x": [{b"y": 1}]}], ids=str)
def test_the_key_of_a_map_is_a_text(fields: dict[Any, Any]) -> None:
    with pytest.raises(WireError, match="key"):
        wire.decode([b"", header(fields=fields)])


def test_nesting_within_the_limit_passes() -> None:
    value: Any = 1
    for _ in range(limits.MAX_NESTING - 3):
        value = [value]
    assert wire.decode([b"", header(fields={"x": value})]).fields["x"] == value


@pytest.mark.parametrize("extension", [msgpack.ExtType(5, b""), msgpack.ExtType(5, b"x" * 9), msgpack.Timestamp(1)])
def test_extension_types_are_refused(extension: Any) -> None:
    with pytest.raises(WireError):
        wire.decode([b"", header(fields={"x": extension})])


@pytest.mark.parametrize(
    "value",
    [dict.fromkeys(map(str, range(limits.MAX_MAP_LENGTH + 1))), [0] * (limits.MAX_SEQUENCE_LENGTH + 1)],
    ids=["map", "list"],
)
def test_giant_collections_are_refused(value: Any) -> None:
    with pytest.raises(WireError):
        wire.decode([b"", header(fields={"x": value})])


def test_a_length_that_was_never_sent_is_refused() -> None:
    for promise in (b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
        with pytest.raises(WireError):
            wire.decode([b"", promise])


@pytest.mark.parametrize("name", ["type", "from", "inc"])
@pytest.mark.parametrize("value", ["", "x" * (limits.MAX_NAME_LENGTH + 1), 5, None, b"bytes"])
def test_names_must_be_short_texts(name: str, value: Any) -> None:
    with pytest.raises(WireError, match=name):
        wire.decode([b"", header(**{name: value})])


@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb(3), msgpack.packb({1: 2}), header() + b"x"]
)
def test_a_header_that_is_no_map_of_names_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode([b"", raw])


@pytest.mark.parametrize(
    "shape",
    [[-1], [-2, -2], [True, 4], [4.0], ["4"], [[4]], [1 << 48, 0], [1] * 9, 4, None, [0, 1 << 47, 1 << 47]],
    ids=str,
)
def test_a_bad_shape_is_refused(shape: Any) -> None:
    with pytest.raises(WireError):
        wire.decode(one_array("x", "uint8", shape, b"abcd" if shape != [0, 1 << 47, 1 << 47] else b""))


@pytest.mark.parametrize("size", [0, 11, 13])
def test_a_wrong_number_of_bytes_is_refused(size: int) -> None:
    with pytest.raises(WireError, match="needs 12"):
        wire.decode(one_array("x", "float32", [3], b"\0" * size))


@pytest.mark.parametrize(
    "dtype", ["object", "O", "f4,i4", "S4", "U4", "datetime64[s]", "V4", "float32 ", "<f4", ">f4", "", 4, None, ["f4"]]
)
def test_a_dtype_outside_the_allow_list_is_refused(dtype: Any) -> None:
    with pytest.raises(WireError):
        wire.decode(one_array("x", dtype, [1], b"\0" * 4))


def test_two_arrays_of_one_name_are_refused() -> None:
    entry = ["x", "uint8", [1]]
    with pytest.raises(WireError, match="twice"):
        wire.decode([b"", header(arrays=[entry, entry]), b"a", b"b"])


def test_arrays_and_buffers_must_be_as_many() -> None:
    with pytest.raises(WireError, match="'x': its buffer did not come"):
        wire.decode([b"", header(arrays=[["x", "uint8", [1]]])])
    with pytest.raises(WireError, match="1 buffers came, more"):
        wire.decode([b"", header(), b"a"])
    with pytest.raises(WireError, match="1 buffers came, more"):
        wire.decode([b"", header(arrays=[["x", "uint8", [1], b"b"]]), b"a"])


def test_small_arrays_travel_in_the_header_and_large_ones_behind_it() -> None:
    arrays = {"small": np.arange(9.0), "large": np.arange(500.0), "last": np.array(7)}
    frames = wire.encode(Message("t", "b", "1", {}, arrays))
    assert len(frames) == 3
    got = through_the_wire(Message("t", "b", "1", {}, arrays)).arrays
    assert list(got) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)


def test_the_bytes_of_a_small_array_must_fit_its_shape() -> None:
    with pytest.raises(WireError, match="needs 2"):
        wire.decode([b"", header(arrays=[["x", "uint8", [2], b"abc"]])])
    with pytest.raises(WireError):
        wire.decode([b"", header(arrays=[["x", "uint8", [3], "abc"]])])


@pytest.mark.parametrize(
    "entry", [[], ["x"], ["x", "uint8", [1], 1], "xyz", {"x": 1}, [1, "uint8", [1]], ["x" * 257, "uint8", [1]]]
)
def test_an_array_entry_of_another_form_is_refused(entry: Any) -> None:
    with pytest.raises(WireError):
        wire.decode([b"", header(arrays=[entry]), b"a"])


@pytest.mark.parametrize("missing", sorted(HEADER))
def test_every_header_field_is_needed(missing: str) -> None:
    with pytest.raises(WireError):
        wire.decode([b"", msgpack.packb({k: v for k, v in HEADER.items() if k != missing})])


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_frames_give_a_message_or_a_wire_error(frames: list[bytes]) -> None:
    decode_or_refuse(frames)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4))


@given(st.dictionaries(st.sampled_from(sorted(HEADER)), values), st.lists(st.binary(max_size=16), max_size=3))
def test_any_header_gives_a_message_or_a_wire_error(changed: dict[str, Any], buffers: list[bytes]) -> None:
    decode_or_refuse([b"", header(**changed), *buffers])


array_entries = st.tuples(
    st.text(max_size=3) | values,
    st.sampled_from(sorted(ALLOWED_DTYPES)) | values,
    st.lists(st.integers(-1, 1 << 48), max_size=9) | values,
)


@given(st.lists(array_entries, min_size=1, max_size=3), st.lists(st.binary(max_size=16), min_size=1, max_size=3))
def test_any_array_entries_give_a_message_or_a_wire_error(entries: list[Any], buffers: list[bytes]) -> None:
    decode_or_refuse([b"", header(arrays=[list(entry) for entry in entries]), *buffers])


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_message_gives_a_message_or_a_wire_error(data: st.DataObject) -> None:
    message = Message("t", "b", "1", {"a": [1, 2.0], "m": {"k": "v"}}, {"x": np.zeros((2, 3), np.float32)}, b"topic")
    frames = [bytearray(frame) for frame in wire.encode(message)]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(0, len(frames) - 1))]
        at = data.draw(st.integers(0, max(0, len(frame) - 1)))
        frame[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    decode_or_refuse([bytes(frame) for frame in frames])


def decode_or_refuse(frames: list[bytes]) -> None:
    try:
        said = repr(wire.decode(frames))  # whatever passes can also be printed
    except WireError as error:
        said = str(error)
        assert len(said) < 1_000
    assert said


def test_a_field_of_the_wrong_type_names_message_field_and_types() -> None:
    with pytest.raises(WireError, match=r"pause: field 'timeout_s' must be float, is str"):
        Message("pause", "o", "1", {"timeout_s": "5"}).get("timeout_s", float)


def test_a_whole_number_passes_as_a_float_and_a_truth_value_as_no_number() -> None:
    assert typed({"x": 3}, "x", float, "t") == 3.0
    for kind in (int, float):
        with pytest.raises(WireError):
            typed({"x": True}, "x", kind, "t")
    with pytest.raises(WireError):
        typed({"x": 3.0}, "x", int, "t")


def test_an_absent_field_is_a_wire_error() -> None:
    with pytest.raises(WireError, match="NoneType"):
        Message("t", "b", "1").get("x", int)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "message",
    [
        Message("", "a", "1"),
        Message("x", "a" * 257, "1"),
        Message("x", "a", "1", {"v": nested(limits.MAX_NESTING)}),
        Message("x", "a", "1", {"v": (nested(limits.MAX_NESTING - 1),)}),
        Message("x", "a", "1", {"v": [0] * (limits.MAX_SEQUENCE_LENGTH + 1)}),
        Message("x", "a", "1", {str(n): 0 for n in range(limits.MAX_MAP_LENGTH + 1)}),
        Message("x", "a", "1", {"v": b"." * limits.MAX_HEADER_BYTES}),
        Message("x", "a", "1", {"v": {1: 2}}),
        Message("x", "a", "1", {"v": msgpack.ExtType(3, b"x")}),
        Message("x", "a", "1", {}, {"n" * 257: np.zeros(1)}),
        Message("x", "a", "1", {}, {"n": np.zeros((1,) * (limits.MAX_DIMENSIONS + 1))}),
        Message("x", "a", "1", {}, dict.fromkeys(map(str, range(limits.MAX_ARRAYS + 1)), np.zeros(1, np.uint8))),
    ],
    ids=["no type", "long name", "deep", "deep tuple", "long list", "long map", "long header", "numbers as keys",
         "extension", "array's name",
         "dimensions", "many arrays"],
)  # fmt: skip
def test_what_would_be_refused_there_is_refused_here(message: Message) -> None:
    with pytest.raises(WireError):
        wire.encode(message)


def test_what_is_just_within_the_limits_is_sent_and_taken() -> None:
    fields = {"deep": nested(limits.MAX_NESTING - 2), "list": [0] * limits.MAX_SEQUENCE_LENGTH}
    sent = Message("x", "a" * 256, "1", fields, {"n": np.zeros((1,) * limits.MAX_DIMENSIONS)})
    assert wire.decode([bytes(frame) for frame in wire.encode(sent)]).fields == fields
