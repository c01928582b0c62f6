from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ami_trainer.frontier import Accepted, Frontiers


def test_batches_in_order_continue_each_other() -> None:
    frontiers = Frontiers()
    assert frontiers.accept("body", "a", 0, 4) == Accepted(skip=0, lost=0, continues=False)
    assert frontiers.accept("body", "a", 4, 2) == Accepted(skip=0, lost=0, continues=True)
    assert frontiers.received() == {"body": 6}


def test_what_was_received_before_is_skipped() -> None:
    frontiers = Frontiers()
    frontiers.accept("body", "a", 0, 4)
    assert frontiers.accept("body", "a", 2, 4) == Accepted(skip=2, lost=0, continues=True)
    assert frontiers.accept("body", "a", 0, 3) == Accepted(skip=3, lost=0, continues=True)
    assert frontiers.received() == {"body": 6}
    assert frontiers.bodies["body"].duplicates == 5


def test_a_gap_is_counted_as_lost_and_breaks_the_segment() -> None:
    frontiers = Frontiers()
    frontiers.accept("body", "a", 0, 4)
    assert frontiers.accept("body", "a", 10, 1) == Accepted(skip=0, lost=6, continues=False)
    assert frontiers.lost() == {"body": 6}


def test_a_late_joiner_has_lost_nothing() -> None:
    assert Frontiers().accept("body", "a", 500, 1) == Accepted(skip=0, lost=0, continues=False)


def test_a_new_incarnation_starts_afresh_and_keeps_the_sums() -> None:
    frontiers = Frontiers()
    frontiers.accept("body", "a", 0, 4)
    frontiers.accept("body", "a", 6, 1)
    assert frontiers.accept("body", "b", 0, 2) == Accepted(skip=0, lost=0, continues=False)
    assert (frontiers.received(), frontiers.lost()) == ({"body": 7}, {"body": 2})


def test_the_beginning_of_a_new_incarnation_that_never_came_is_lost() -> None:
    frontiers = Frontiers()
    frontiers.accept("body", "a", 0, 4)
    assert frontiers.accept("body", "b", 7, 1) == Accepted(skip=0, lost=7, continues=False)


def test_what_the_buffer_refuses_is_lost_and_not_received() -> None:
    frontiers = Frontiers()
    frontiers.accept("body", "a", 0, 4)
    frontiers.refuse("body", 3)
    assert (frontiers.received(), frontiers.lost()) == ({"body": 1}, {"body": 3})


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=40))
def test_every_record_is_taken_once_in_order_or_counted(batches: list[tuple[int, int]]) -> None:
    frontiers, taken = Frontiers(), []
    start = batches[0][0]
    for first, count in batches:
        accepted = frontiers.accept("body", "a", first, count)
        taken += range(first + accepted.skip, first + count)
    assert (np.diff(taken) > 0).all()
    known = frontiers.bodies["body"]
    assert known.received == len(taken)
    assert known.received + known.lost == known.next_sequence - start
