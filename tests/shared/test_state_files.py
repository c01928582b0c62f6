"""State as files: what goes in comes out, and anything else is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ami_shared.errors import WireError
from ami_shared.state import (
    DTYPES,
    Restorable,
    StateFile,
    copied,
    from_files,
    names_of,
    restore_each,
    state_of,
    to_files,
)

names = st.text(st.characters(blacklist_characters="/", blacklist_categories=["Cs"]), max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
arrays = st.sampled_from(sorted(DTYPES.values())).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)
leaves = scalars | st.lists(scalars, max_size=3) | arrays
trees = st.recursive(
    st.dictionaries(names, leaves, max_size=4), lambda inner: st.dictionaries(names, leaves | inner, max_size=4)
)


def contents(files: list[StateFile]) -> dict[str, bytes]:
    return {file.path: file.read(0, 1 << 30) for file in files}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


@given(trees)
def test_what_is_kept_comes_back(tree: dict[str, Any]) -> None:
    assert_same(from_files("a/b", contents(to_files("a/b", tree))), tree)


def test_numbers_of_numpy_and_huge_ones_are_kept() -> None:
    random = np.random.default_rng(5)
    tree = {"float": np.float32(0.5), "int": np.int64(7), "random": random.bit_generator.state, "infinite": math.inf}
    back = from_files("x", contents(to_files("x", tree)))
    assert back == {"float": 0.5, "int": 7, "random": random.bit_generator.state, "infinite": math.inf}


def test_the_library_of_the_format_reads_it_too() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.array([True, False]), "d": 1}
    (json_file, file) = to_files("x", tree)
    assert json.loads(json_file.read(0, 100)) == {"a": {}, "d": 1}
    read = safetensors.load(file.read(0, 1 << 20))
    assert sorted(read) == ["a/b", "c"]
    np.testing.assert_array_equal(read["a/b"], tree["a"]["b"])  # type: ignore[index]


@pytest.mark.parametrize("size", [1, 3, 7, 64, 1000])
def test_a_file_can_be_read_in_pieces(size: int) -> None:
    _, file = to_files("x", {"a": np.arange(40, dtype=np.uint8), "b": np.arange(7, dtype=np.float64)})
    pieces = [file.read(at, size) for at in range(0, file.nbytes, size)]
    assert b"".join(pieces) == file.read(0, file.nbytes)
    assert file.read(file.nbytes, 10) == b""


@pytest.mark.parametrize("leaf", [object(), {1, 2}, np.array(["text"]), np.zeros(2, np.complex128), b"bytes"])
def test_what_cannot_be_kept_is_refused(leaf: Any) -> None:
    with pytest.raises(TypeError):
        to_files("x", {"a": leaf})


@pytest.mark.parametrize("name", ["a/b", 3])
def test_a_name_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match="is not a name"):
        to_files("x", {name: 1})


@given(st.binary(max_size=200))
def test_any_bytes_give_a_tree_or_an_error(content: bytes) -> None:
    for files in ({"x.json": content}, {"x.json": b"{}", "x.safetensors": content}):
        try:
            from_files("x", files)
        except WireError:
            continue


def damaged(header: dict[str, Any] | list[Any], data: bytes = b"\0" * 8) -> dict[str, bytes]:
    told = json.dumps(header).encode()
    return {"x.json": b'{"deep": 3}', "x.safetensors": len(told).to_bytes(8, "little") + told + data}


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1] * 9 + [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        7,
    ],
)
def test_an_array_that_is_not_described_as_it_must_be_is_refused(about: Any) -> None:
    with pytest.raises(WireError, match="not described"):
        from_files("x", damaged({"a": about}))


def test_an_array_without_a_place_in_the_tree_is_refused() -> None:
    about = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for name in ("absent/a", "deep/a"):
        with pytest.raises(WireError, match="no place"):
            from_files("x", damaged({name: about}))


def test_a_missing_or_torn_file_is_named() -> None:
    with pytest.raises(WireError, match=r"x\.json"):
        from_files("x", {})
    with pytest.raises(WireError, match="cut short"):
        from_files("x", {"x.json": b"{}", "x.safetensors": b"\xff" * 40})
    with pytest.raises(WireError, match="holds no map"):
        from_files("x", damaged([]))


def test_copies_do_not_change_with_what_was_copied() -> None:
    live = {"inner": {"array": np.zeros(3)}, "n": 1}
    copy = copied(live)
    live["inner"]["array"][:] = 7  # type: ignore[index]
    np.testing.assert_array_equal(copy["inner"]["array"], np.zeros(3))


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        if state["count"] < 0:
            raise WireError("a negative count")
        self.count = state["count"]


def test_all_that_fits_is_restored_and_the_rest_is_named() -> None:
    good, bad, absent = Counter(), Counter(), Counter()
    with pytest.raises(WireError, match=r"bad: a negative count; absent: 'absent'"):
        restore_each({"bad": bad, "absent": absent, "good": good}, {"good": {"count": 4}, "bad": {"count": -1}})
    assert (good.count, bad.count, absent.count) == (4, 0, 0)


class Network(Counter):
    def restore(self, state: dict[str, Any]) -> None:
        raise RuntimeError("Error(s) in loading state_dict for Network:\n\tsize mismatch for weight")


def test_a_network_of_another_size_does_not_fit_and_is_no_defect() -> None:
    counter = Counter()
    with pytest.raises(WireError, match=r"network: Error.* size mismatch for weight"):
        restore_each({"network": Network(), "counter": counter}, {"network": {"count": 1}, "counter": {"count": 4}})
    assert counter.count == 4


def test_what_remembers_nothing_takes_part_all_the_same() -> None:
    assert state_of(object()) == {}
    assert state_of(Counter(3)) == {"count": 3, "class": "Counter"}
    counter = Counter(5)
    restore_each({"a": Restorable(object()), "b": Restorable(counter)}, {"a": {"count": 1}, "b": {}})
    assert counter.count == 5


def test_what_belongs_to_another_class_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    class Other(Counter):
        pass

    counter = Counter(5)
    restore_each({"a": Restorable(counter)}, {"a": state_of(Other(3))})
    assert counter.count == 5
    assert "starts afresh" in caplog.text
    restore_each({"a": Restorable(counter)}, {"a": {"count": 7}})
    assert counter.count == 7, "from before classes were kept"


def test_names_are_those_of_the_trees() -> None:
    assert names_of(["a/b.json", "a/b.safetensors", "c.json"]) == ["a/b", "c"]
