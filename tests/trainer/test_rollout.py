from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from experience import batches, equal, record
from hypothesis import given
from hypothesis import strategies as st

from ami_shared import limits
from ami_shared.errors import WireError
from ami_shared.records import Ending
from ami_shared.settled import is_window_end
from ami_trainer.buffers.rollout import GONE_AFTER_ROLLOUTS, RolloutBuffer

COLUMNS = ("observation", "action", "log_prob", "value", "reward", "rewarded")


def make(length: int = 4, waiting: int = 2) -> RolloutBuffer:
    buffer = RolloutBuffer(length, waiting)
    buffer.require(COLUMNS)
    return buffer


def all_rewards(buffer: RolloutBuffer) -> list[list[float]]:
    told: list[list[float]] = [taken.columns["reward"].tolist() for taken in buffer.take()]
    buffer.release()
    return told


def rewards(buffer: RolloutBuffer) -> list[float]:
    (told,) = all_rewards(buffer)
    return told


def test_the_last_record_of_a_rollout_is_the_first_of_the_next() -> None:
    buffer = make()
    for batch in batches([record(n) for n in range(9)]):
        buffer.add(batch, True, "policy_value")
    assert rewards(buffer) == [0, 1, 2, 3, 4]
    assert rewards(buffer) == [4, 5, 6, 7, 8]
    assert not buffer.ready()


def test_a_rollout_is_whole_where_bodies_in_lockstep_wait() -> None:
    buffer = make(length=4)
    whole = []
    for n in range(21):
        for batch in batches([record(n)]):
            buffer.add(batch, True, "policy_value")
        if buffer.ready():
            whole.append(n + 1)
            rewards(buffer)
    assert whole == [records for records in range(2, 22) if is_window_end(records, 4)] == [5, 9, 13, 17, 21]


@pytest.mark.parametrize("length", [32, 100, 1_000])
def test_what_one_batch_brings_can_all_be_used(length: int) -> None:
    buffer = RolloutBuffer(length)
    buffer.require(COLUMNS)
    lived = [record(n) for n in range(4 * limits.BATCH_RECORDS)]
    taken = 0
    for batch in batches(lived, cuts=range(0, len(lived), limits.BATCH_RECORDS)):
        buffer.add(batch, True, "policy_value")
        while buffer.ready():
            taken += len(rewards(buffer)) - 1
    assert (taken, buffer.overflowed) == ((len(lived) - 1) // length * length, 0)


def test_segments_gaps_and_endings_are_marked() -> None:
    buffer = make(length=6)
    lived = [record(0), record(1), record(2, 1), record(3, 1, Ending.TERMINATED), record(4, 2), record(5, 2)]
    (first,) = batches(lived)
    buffer.add(first, False, "policy_value")
    (second,) = batches([record(7, 2, version=5)])
    buffer.add(second, False, "policy_value")  # number 6 was lost
    (rollout,) = buffer.take()
    assert rollout.follows.tolist() == [False, True, False, True, False, True, False]
    assert rollout.endings.tolist() == [0, 0, 0, 2, 0, 0, 0]
    assert rollout.versions.tolist() == [1, 1, 1, 1, 1, 1, 5]


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 7))
def test_however_a_stream_is_cut_its_rollouts_are_the_same(cuts: list[int], length: int) -> None:
    lived = [record(n, segment=n // 5) for n in range(40)]
    whole, parts = make(length, waiting=100), make(length, waiting=100)
    for batch in batches(lived):
        whole.add(batch, True, "policy_value")
    for batch in batches(lived, cuts):
        parts.add(batch, True, "policy_value")
    assert whole.ready() == parts.ready()
    while whole.ready():
        (one,), (other,) = whole.take(), parts.take()
        assert equal(one.columns, other.columns)
        assert one.follows.tolist() == other.follows.tolist()


def test_bodies_do_not_mix() -> None:
    buffer = make(length=2)
    for n in range(3):
        for body, base in (("a", 0.0), ("b", 100.0)):
            for batch in batches([record(n, reward=np.asarray(base + n, np.float32))], body=body):
                buffer.add(batch, True, "policy_value")
    assert all_rewards(buffer) == [[0, 1, 2], [100, 101, 102]]
    assert not buffer.ready()


def lives(buffer: RolloutBuffer, body: str, begin: int, end: int) -> None:
    for batch in batches([record(n) for n in range(begin, end)], body=body):
        buffer.add(batch, True, "policy_value")


def test_rollouts_of_several_bodies_are_taken_together_as_soon_as_half_of_them_have_one() -> None:
    buffer = make(length=4, waiting=3)
    for body in "abcd":
        lives(buffer, body, 0, 2)
    lives(buffer, "a", 2, 9)
    assert not buffer.ready(), "one of four"
    lives(buffer, "b", 2, 5)
    assert buffer.ready()
    assert all_rewards(buffer) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert not buffer.ready()
    for body in "cd":
        lives(buffer, body, 2, 5)
    assert [len(told) for told in all_rewards(buffer)] == [5, 5, 5], "with the second one of the first body"


def test_nobody_waits_for_bodies_that_are_away() -> None:
    buffer = make(length=4, waiting=100)
    for body in "abcd":
        lives(buffer, body, 0, 2)
    lives(buffer, "a", 2, 28)
    assert not buffer.ready()
    lives(buffer, "a", 28, 60)
    assert buffer.ready(), "the others have been silent while it filled more than two rollouts for each of the four"


def test_each_body_may_let_as_many_rollouts_wait() -> None:
    buffer = make(length=2, waiting=1)
    for body in "abcdefgh":
        lives(buffer, body, 0, 3)
    assert len(all_rewards(buffer)) == 8
    assert buffer.statistics()["overflowed"] == 0


def test_the_oldest_rollout_gives_way_and_is_counted() -> None:
    buffer = make(length=2, waiting=1)
    for batch in batches([record(n) for n in range(7)]):
        buffer.add(batch, True, "policy_value")
    assert rewards(buffer) == [4, 5, 6]
    assert not buffer.ready()
    assert buffer.statistics()["overflowed"] == 4


def test_more_may_wait_only_while_the_policy_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCH_RECORDS", 2)
    buffer = make(length=2, waiting=6)
    for batch in batches([record(n, version=1) for n in range(13)]):
        buffer.add(batch, True, "policy_value")
    assert buffer.statistics()["waiting"] == 6
    assert buffer.statistics()["overflowed"] == 0
    for batch in batches([record(n, version=2) for n in range(13, 17)]):
        buffer.add(batch, True, "policy_value")
    assert buffer.statistics()["waiting"] == 2, "what a batch may bring, where somebody learns"
    assert rewards(buffer) == [12, 13, 14]


def test_in_lockstep_no_rollout_gives_way() -> None:
    buffer = make(length=2, waiting=1)
    buffer.keep_all()
    for batch in batches([record(n) for n in range(7)]):
        buffer.add(batch, True, "policy_value")
    assert [rewards(buffer) for _ in range(3)] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert buffer.statistics()["overflowed"] == 0


def test_a_rollout_is_not_written_to_while_it_is_used() -> None:
    buffer = make(length=2, waiting=2)
    for batch in batches([record(n) for n in range(3)]):
        buffer.add(batch, True, "policy_value")
    (taken,) = buffer.take()
    for batch in batches([record(n) for n in range(3, 12)]):
        buffer.add(batch, True, "policy_value")
    assert taken.columns["reward"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype", "version"])
def test_records_of_another_form_are_refused_and_change_nothing(fault: str) -> None:
    buffer = make()
    (good,) = batches([record(n) for n in range(2)])
    buffer.add(good, True, "policy_value")
    odd = record(2)
    data = dict(odd.data)
    if fault == "missing":
        del data["log_prob"]
    elif fault == "shape":
        data["observation"] = np.zeros(3, np.float32)
    elif fault == "dtype":
        data["observation"] = np.zeros(2, np.float64)
    versions = {} if fault == "version" else odd.versions
    (bad,) = batches([type(odd)(0, 2, 0.0, 0.0, versions, data)])
    with pytest.raises(WireError):
        buffer.add(bad, True, "policy_value")
    assert buffer.statistics()["fill"] == 2


def test_what_a_body_that_is_gone_has_left_is_forgotten_in_the_end() -> None:
    buffer, number = make(length=2, waiting=1), 0

    def lives(body: str, count: int) -> None:
        nonlocal number
        for batch in batches([record(number + n) for n in range(count)]):
            buffer.add(replace(batch, body=body), True, "policy_value")
        number += count

    for n in range(40):
        lives(f"body{n}", 1)
    lives("stays", 1)
    assert len(buffer._bodies) == 41
    for _ in range(41 * GONE_AFTER_ROLLOUTS):
        lives("stays", 2)
    assert list(buffer._bodies) == ["stays"]
    lives("body1", 1)
    assert buffer.statistics()["capacity"] == 6, "one that returns has room again"


def test_steps_that_are_forgotten_are_counted() -> None:
    buffer = make(length=4)
    for batch in batches([record(n) for n in range(7)]):
        buffer.add(batch, True, "policy_value")
    longer = make(length=5)
    longer.restore(buffer.state())
    assert longer.overflowed == 6
    lived = [record(n) for n in range(8 + 4 * 2 * GONE_AFTER_ROLLOUTS)]
    for batch in batches(lived, cuts=range(0, len(lived), 4)):
        buffer.add(replace(batch, body="stays"), True, "policy_value")
        all_rewards(buffer)
    assert "body" not in buffer._bodies
    assert buffer.overflowed == 2, "one rollout was used, and of the one begun there were three records"


def test_fast_bodies_do_not_lose_what_they_lived_to_slow_ones() -> None:
    buffer, used = RolloutBuffer(128), 0
    buffer.require(COLUMNS)
    for tick in range(0, 4_000, 10):
        lives(buffer, "fast", tick, tick + 10)
        for slow in "abc":
            lives(buffer, slow, tick // 10, tick // 10 + 1)
        while buffer.ready():
            used += 128 * len(all_rewards(buffer))
    assert buffer.statistics()["overflowed"] == 0
    assert used >= 3_500
