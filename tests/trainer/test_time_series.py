from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_shared.errors import WireError
from ami_shared.records import Record, RecordBatch
from ami_shared.state import copied
from ami_trainer.buffers.time_series import TimeSeriesBuffer

Stream = list[tuple[str, str, int, int, bool]]  # body, incarnation, segment, number, continues


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Several bodies whose records come in turns, with new segments, new incarnations and gaps."""
    states: dict[str, list[Any]] = {}
    stream: Stream = []
    for _ in range(draw(st.integers(1, 80))):
        body = draw(st.sampled_from(["a", "b"]))
        state = states.setdefault(body, [0, 0, 0])  # incarnation, segment, number
        event = draw(st.sampled_from(["go on"] * 8 + ["segment", "incarnation", "gap"]))
        if event == "segment":
            state[1] += 1
        if event == "incarnation":
            state[0], state[1] = state[0] + 1, 0
        state[2] += 5 if event == "gap" else 1
        stream.append((body, f"{body}{state[0]}", state[1], state[2], event in ("go on", "segment")))
    return stream


def add(buffer: TimeSeriesBuffer, body: str, incarnation: str, segment: int, number: int, continues: bool) -> None:
    about = np.array([ord(body), int(incarnation[1:]), segment, number], np.int64)
    batch = RecordBatch.stack(body, incarnation, [Record(segment, number, 0.0, 0.0, {}, {"about": about})])
    buffer.add(batch, continues)


@given(streams(), st.integers(1, 6), st.integers(2, 20))
def test_no_window_ever_crosses_a_border(stream: Stream, length: int, capacity: int) -> None:
    buffer = TimeSeriesBuffer(capacity, ("about",))
    for event in stream:
        add(buffer, *event)
    if buffer.windows(length) == 0:
        assert buffer.sample(1, length) is None
        return
    sampled = buffer.sample(30, length)
    assert sampled is not None
    windows = sampled["about"]
    assert windows.shape == (30, length, 4)
    assert (windows[:, :, :3] == windows[:, :1, :3]).all()  # one body, one incarnation, one segment
    assert (np.diff(windows[:, :, 3], axis=1) == 1).all()  # and no gap


@given(streams(), st.integers(1, 5))
def test_every_window_that_there_is_can_come(stream: Stream, length: int) -> None:
    buffer = TimeSeriesBuffer(100, ("about",), seed=1)
    runs: dict[str, list[tuple[str, int, int]]] = {}
    expected = set()
    for body, incarnation, segment, number, continues in stream:
        add(buffer, body, incarnation, segment, number, continues)
        run = runs.setdefault(body, [])
        if run and (run[-1][:2] != (incarnation, segment) or not continues):
            run.clear()
        run.append((incarnation, segment, number))
        if len(run) >= length:
            expected.add((body, number))
    assert buffer.windows(length) == len(expected)
    if expected:
        seen = {(chr(w[-1][0]), int(w[-1][3])) for w in buffer.sample(60 * len(expected), length)["about"]}
        assert seen == expected


def test_fresh_windows_come_once_side_by_side_and_wait_until_they_are_whole() -> None:
    buffer = TimeSeriesBuffer(50, ("about",))
    taken = []
    for number in range(1, 24):
        add(buffer, "a", "a0", 0, number, True)
        if (fresh := buffer.take_fresh(4, 8)) is not None:
            taken += [window[:, 3].tolist() for window in fresh["about"]]
    assert taken == [[1 + n, 2 + n, 3 + n, 4 + n] for n in range(0, 20, 4)]


def test_of_many_bodies_fresh_windows_are_as_many_as_of_one_and_those_passed_over_do_not_come_again() -> None:
    buffer = TimeSeriesBuffer(50, ("about",))
    for body in "abc":
        for number in range(1, 21):
            add(buffer, body, body + "0", 0, number, True)
    fresh = buffer.take_fresh(4, 5)
    assert sorted(fresh["about"][:, -1, 3].tolist()) == [16, 16, 20, 20, 20], "the newest of each in turn"
    assert buffer.take_fresh(4, 5) is None


def test_where_there_are_more_bodies_than_fresh_windows_they_take_turns() -> None:
    buffer = TimeSeriesBuffer(50, ("about",))
    seen = []
    for last in (4, 8, 12):
        for body in "abcde":
            for number in range(last - 3, last + 1):
                add(buffer, body, body + "0", 0, number, True)
        seen.append([chr(body) for body in buffer.take_fresh(4, 2)["about"][:, 0, 0]])
    assert seen == [["a", "b"], ["c", "d"], ["e", "a"]]


@given(st.integers(1, 6), st.lists(st.integers(1, 12), min_size=4, max_size=20))
def test_nothing_is_learned_from_before_it_was_fresh_or_passed_over(length: int, arrivals: list[int]) -> None:
    buffer = TimeSeriesBuffer(1_000, ("about",))
    number, learned = 0, 0
    for count in arrivals:
        for _ in range(count):
            number += 1
            add(buffer, "a", "a0", 0, number, True)
        if (fresh := buffer.take_fresh(length, 3)) is not None:
            assert fresh["about"][:, :, 3].min() > learned
        if buffer.windows(length):
            learned = max(learned, int(buffer.sample(200, length)["about"][:, :, 3].max()))


def test_without_a_look_at_what_is_fresh_all_is_learned_from() -> None:
    buffer = TimeSeriesBuffer(50, ("about",))
    for number in range(1, 4):
        add(buffer, "a", "a0", 0, number, True)
    assert buffer.sample(5, 3)["about"][:, :, 3].tolist() == [[1, 2, 3]] * 5


def test_the_newest_window_is_the_last_whole_one() -> None:
    buffer = TimeSeriesBuffer(50, ("about",))
    assert buffer.newest(2) is None
    for number in (1, 2, 3):
        add(buffer, "a", "a0", 0, number, True)
    add(buffer, "a", "a0", 1, 4, True)
    newest = buffer.newest(2)
    assert newest is not None
    assert newest["about"][0, :, 3].tolist() == [2, 3]


def test_the_newest_window_is_that_of_the_body_that_was_heard_last() -> None:
    buffer = TimeSeriesBuffer(50, ("about",))
    for body in ("a", "b"):
        for number in (1, 2):
            add(buffer, body, "a0", 0, number + 10 * (body == "b"), True)
    newest = buffer.newest(2)
    assert newest is not None
    assert newest["about"][0, :, 3].tolist() == [11, 12]


def test_a_body_that_has_gone_is_forgotten_once_the_others_could_have_filled_its_room() -> None:
    buffer = TimeSeriesBuffer(5, ("about",))
    add(buffer, "g", "a0", 0, 1, True)
    for number in range(10):
        add(buffer, "h", "a0", 0, number, True)
    assert len(buffer) == 6
    again = TimeSeriesBuffer(5, ("about",))
    again.restore(copied(buffer.state()))
    for kept in (buffer, again):
        for number in range(11):
            add(kept, "h", "a0", 0, number, True)
        assert len(kept) == 5
        assert set(kept.state()["bodies"]) == {"h"}


def test_records_without_the_columns_or_of_another_shape_are_refused() -> None:
    buffer = TimeSeriesBuffer(5, ("about",))
    add(buffer, "a", "a0", 0, 1, True)
    for data in ({}, {"about": np.zeros(3, np.int64)}, {"about": np.zeros(4, np.float32)}):
        batch = RecordBatch.stack("a", "a0", [Record(0, 2, 0.0, 0.0, {}, data)])
        with pytest.raises(WireError):
            buffer.add(batch, True)
    assert buffer.statistics() == {"kind": "newest records in order", "fill": 1, "capacity": 5, "seen": 1}
