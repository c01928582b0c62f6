"""How far a trainer has a body's stream: order, gaps, fetching, losses, new lives; no sockets and no clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning import numbered

from ami_shared import limits
from ami_shared.checkpoints import Cut
from ami_shared.experience import Extent, Fetched
from ami_trainer.frontier import SILENT_LIFE, BodyStream
from ami_trainer.life import SPOILT_ANSWERS

EVERYTHING = 1 << 40


def taken(stream: BodyStream) -> list[tuple[list[int], bool]]:
    """Take all that is in order: the sequence numbers, and whether they continue the last ones."""
    found = []
    while item := stream.take():
        batch, continues = item
        found.append((list(range(batch.first_sequence, batch.end)), continues))
    return found


def extent(first: int, end: int, life: str = "a") -> Extent:
    return Extent("body", life, (first, end))


@pytest.fixture
def stream() -> BodyStream:
    """A stream whose records 0 to 3 have been taken."""
    made = BodyStream(history=0)
    made.arrived(numbered(4), live=True)
    assert taken(made) == [([0, 1, 2, 3], False)]
    return made


def test_batches_in_order_continue_each_other(stream: BodyStream) -> None:
    stream.arrived(numbered(2, first=4), live=True)
    stream.arrived(numbered(1, first=6), live=True)
    assert taken(stream) == [([4, 5], True), ([6], True)]
    assert stream.wish(0.0) is None


def test_what_was_received_before_is_refused_and_counted(stream: BodyStream) -> None:
    stream.arrived(numbered(4, first=2), live=True)
    stream.arrived(numbered(3, first=0), live=True)
    assert taken(stream) == [([4, 5], True)]
    assert stream.counters.duplicates == 5


def test_what_came_ahead_of_a_gap_waits_until_the_gap_is_filled(stream: BodyStream) -> None:
    stream.arrived(numbered(2, first=8), live=True)
    stream.arrived(numbered(2, first=8), live=True)
    assert taken(stream) == []
    assert stream.wish(0.0) == ("a", (4, 8))
    stream.arrived(numbered(4, first=4), live=False)
    assert taken(stream) == [([4, 5, 6, 7], True), ([8, 9], True)]
    counters = stream.counters
    assert (counters.gaps, counters.missed, counters.lost, counters.duplicates) == (1, 4, 0, 2)


def test_a_wish_is_repeated_only_when_its_answer_ended_or_stays_away(stream: BodyStream) -> None:
    stream.arrived(numbered(1, first=8), live=True)
    assert stream.wish(0.0)
    assert stream.wish(limits.FETCH_PATIENCE * 0.9) is None
    assert stream.wish(limits.FETCH_PATIENCE)
    stream.arrived(numbered(2, first=4), live=False)
    stream.answered(Fetched("body", "a", (4, 6)), now=3.0)
    assert stream.wish(3.0) == ("a", (6, 8))
    stream.answered(Fetched("body", "a", (6, 8)), now=4.0)
    assert stream.wish(4.0) is None, "an answer that brought nothing is no reason to hurry"
    assert stream.wish(4.0 + limits.FETCH_PAUSE) == ("a", (6, 8))


def test_the_silent_tail_is_noticed(stream: BodyStream) -> None:
    stream.told(extent(0, 9))
    assert stream.wish(0.0) == ("a", (4, 9))
    assert (stream.counters.gaps, stream.counters.missed) == (1, 5)


def test_an_extent_that_was_overtaken_takes_nothing_back(stream: BodyStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNTAKEN_BYTES", 0)
    stream.arrived(numbered(9, first=4), live=True)  # postponed
    stream.arrived(numbered(5, first=13), live=True)
    stream.told(extent(0, 4))
    stream.told(extent(0, 3, life="b"))
    assert (stream.counters.missed, stream.counters.lost) == (3, 9), "what died with it is counted"
    assert [numbers for numbers, _ in taken(stream)] == [[13, 14, 15, 16, 17]]


def test_what_left_the_ring_is_lost_with_its_extent_and_breaks_the_segment(stream: BodyStream) -> None:
    stream.arrived(numbered(2, first=10), live=True)
    stream.told(extent(7, 12))
    assert stream.counters.lost == 3
    assert stream.wish(0.0) == ("a", (7, 10))
    stream.arrived(numbered(1, first=9), live=False)
    stream.answered(Fetched("body", "a", (7, 10), gone=((7, 9),)), now=0.0)
    assert taken(stream) == [([9], False), ([10, 11], True)]
    assert stream.counters.lost == 5
    assert (stream.counters.lost_from, stream.counters.lost_to) == (4, 9)
    stream.told(extent(20, 21))
    assert stream.counters.lost == 5 + 8
    assert (stream.counters.lost_from, stream.counters.lost_to) == (12, 20)


def test_what_has_come_is_not_lost_when_it_leaves_the_ring(stream: BodyStream) -> None:
    stream.arrived(numbered(2, first=6), live=True)
    stream.told(extent(9, 12))
    assert taken(stream) == [([6, 7], False)]
    assert stream.counters.lost == 3
    assert stream.wish(0.0) == ("a", (9, 12))


def test_a_late_joiner_asks_for_as_much_of_the_past_as_it_can_use_and_has_lost_nothing() -> None:
    joined = BodyStream(history=10)
    joined.arrived(numbered(1, first=500), live=True)
    assert joined.wish(0.0) == ("a", (490, 500))
    joined.told(extent(495, 501))
    joined.arrived(numbered(5, first=495), live=False)
    assert taken(joined) == [([495, 496, 497, 498, 499], False), ([500], True)]
    counters = joined.counters
    assert (counters.lost, counters.gaps, counters.missed) == (0, 0, 0)


def test_one_that_needs_no_past_begins_with_what_it_hears() -> None:
    joined = BodyStream(history=0)
    joined.told(extent(0, 500))
    assert joined.wish(0.0) is None
    joined.arrived(numbered(1, first=500), live=True)
    assert taken(joined) == [([500], False)]


def test_a_new_life_is_wanted_from_birth_and_what_missed_of_the_last_is_lost(stream: BodyStream) -> None:
    stream.told(extent(0, 6))
    stream.arrived(numbered(2, first=3, life="b"), live=True)
    assert stream.counters.lost == 2
    assert stream.wish(0.0) == ("b", (0, 3))
    stream.arrived(numbered(9, first=4), live=True)  # late, of the life that ended
    stream.arrived(numbered(3, life="b"), live=False)
    assert taken(stream) == [([0, 1, 2], False), ([3, 4], True)]
    assert stream.counters.received == 9


def test_what_was_accepted_of_a_former_life_is_taken_before_the_new_one(stream: BodyStream) -> None:
    stream.arrived(numbered(1, first=4), live=True)
    stream.arrived(numbered(1, life="b"), live=True)
    assert taken(stream) == [([4], True), ([0], False)]


def test_what_comes_late_of_a_former_life_is_lost_unless_that_life_goes_on(stream: BodyStream) -> None:
    stream.arrived(numbered(1, life="b"), live=True)
    assert not stream.arrived(numbered(3, first=6), live=True)
    for _ in range(2):
        stream.told(extent(0, 10))
    assert stream.counters.lost == 6
    later = 2 * SILENT_LIFE
    assert stream.arrived(numbered(1, first=10), live=True, now=later)
    assert stream.counters.lost == 0
    assert stream.wish(later) == ("a", (4, 10))


def test_what_did_not_fit_the_buffer_is_lost_and_a_gap(stream: BodyStream) -> None:
    stream.arrived(numbered(1, first=4), live=True)
    stream.arrived(numbered(1, first=5), live=True)
    refused = stream.take()
    assert refused
    stream.refuse(refused[0])
    assert taken(stream) == [([5], False)]
    assert (stream.counters.received, stream.counters.lost) == (5, 1)


def test_what_waits_is_bounded_and_fetched_later(stream: BodyStream, monkeypatch: pytest.MonkeyPatch) -> None:
    size = numbered(1).nbytes + limits.BATCH_OVERHEAD_BYTES
    monkeypatch.setattr(limits, "UNTAKEN_BYTES", 4 * size)
    monkeypatch.setattr(limits, "AHEAD_BYTES", 2 * size)
    for n in range(4, 10):
        stream.arrived(numbered(1, first=n), live=True)
    assert stream.counters.postponed == 1, "9 waits ahead, 8 was too much"
    assert stream.wish(0.0) is None, "too much waits already"
    assert len(taken(stream)) == 4
    assert stream.wish(0.0) == ("a", (8, 9))
    for n in range(12, 16):
        stream.arrived(numbered(1, first=n), live=True)
    assert stream.counters.postponed == 4
    for n in (8, 10, 11):
        stream.arrived(numbered(1, first=n), live=False)
    assert [numbers for numbers, _ in taken(stream)] == [[8], [9], [10], [11], [12]]
    stream.answered(Fetched("body", "a", (8, 12)), now=0.0)
    assert stream.wish(0.0) == ("a", (13, 16)), "a full store ahead of a gap never keeps the gap from being filled"


def test_tiny_records_are_bounded_in_number(stream: BodyStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "AHEAD_BYTES", 10 * limits.BATCH_OVERHEAD_BYTES)
    for n in range(6, 106):
        stream.arrived(numbered(1, first=n), live=True)
    assert stream.counters.postponed == 90


@pytest.mark.parametrize("and_dies", [False, True])
def test_a_late_joiner_counts_what_is_lost_since_it_heard_of_the_body(and_dies: bool) -> None:
    joined = BodyStream(history=EVERYTHING)
    joined.told(extent(0, 100))
    if and_dies:
        joined.told(extent(0, 160))
        joined.told(extent(0, 0, life="b"))
    else:
        joined.told(extent(150, 160))
    assert joined.counters.lost == (60 if and_dies else 50), "of the hundred before them nobody knows"


def test_what_waits_of_a_former_life_is_lost_to_one_who_goes_on_from_a_save(stream: BodyStream) -> None:
    stream.arrived(numbered(7, first=4), live=True)
    stream.told(extent(0, 0, life="b"))
    again = BodyStream(history=0)
    again.restore(stream.state())
    counters = again.counters
    assert (counters.received, counters.lost) == (4, 7)
    assert [numbers for numbers, _ in taken(stream)] == [list(range(4, 11))], "this process takes them"
    assert stream.counters.lost == 0


def test_losses_that_nothing_waits_ahead_of_are_not_remembered(stream: BodyStream) -> None:
    for n in range(1, 1_000):
        stream.told(extent(4 + n, 5 + n))
    assert stream.life is not None
    assert len(stream.life._lost_ahead) == 0
    assert stream.counters.lost == 999


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["ok", "ok", "drop", "late", "again"])), max_size=40))
def test_whatever_the_wire_does_records_are_taken_once_in_order_or_lost(moves: list[tuple[int, str]]) -> None:
    stream, published, late = BodyStream(history=EVERYTHING), 0, []
    numbers: list[int] = []
    for count, fate in moves:
        batch = numbered(count, first=published)
        published += count
        if fate in ("ok", "again"):
            stream.arrived(batch, live=True)
        if fate == "again":
            stream.arrived(replace(batch), live=False)
        if fate == "late":
            late.append(batch)
        numbers += [n for found, _ in taken(stream) for n in found]
    for batch in late:
        stream.arrived(batch, live=False)
    stream.told(extent(published, published))  # nothing is retained: what is missing is gone
    numbers += [n for found, _ in taken(stream) for n in found]
    assert numbers == sorted(set(numbers))
    before_the_first = numbers[0] if numbers else published
    assert len(numbers) + stream.counters.lost + before_the_first == published


@pytest.mark.parametrize("returned", [False, True])
def test_a_gap_right_before_where_it_stood_is_a_gap_to_whoever_goes_on(returned: bool) -> None:
    stream = BodyStream(history=0)
    stream.arrived(numbered(5), live=True)
    assert stream.take()
    stream.told(Extent("body", "a", (100, 120)))
    if returned:
        stream.arrived(numbered(5, first=100), live=True)
    again = BodyStream(history=0)
    again.restore(stream.state())
    again.arrived(numbered(5, first=100), live=True)
    taken = again.take()
    assert taken is not None
    assert (taken[0].first_sequence, taken[1]) == (100, False)
    third = BodyStream(history=0)
    third.restore(again.state(), broken=True)
    third.arrived(numbered(5, first=105), live=True)
    taken = third.take()
    assert taken is not None
    assert not taken[1]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_comes_malformed_however_often_it_is_asked_for_counts_as_lost(stream: BodyStream, ahead: bool) -> None:
    """Record 4 is malformed; with `ahead`, what follows it has come."""
    stream.told(extent(0, 8))
    now = 0.0
    for n in range(SPOILT_ANSWERS):
        assert stream.wish(now) == ("a", (4, 5) if ahead and n else (4, 8))
        if ahead:
            stream.arrived(numbered(3, first=5), live=False)
        stream.answered(Fetched("body", "a", (4, 5)), now, spoilt=True)
        now += limits.FETCH_PAUSE
    assert stream.counters.lost == 1
    if not ahead:
        assert stream.wish(now) == ("a", (5, 8))
        stream.arrived(numbered(3, first=5), live=False)
    assert taken(stream) == [([5, 6, 7], False)]


def test_what_an_answer_does_not_bring_is_asked_for_as_long_as_nothing_malformed_comes(stream: BodyStream) -> None:
    stream.told(extent(0, 8))
    for n in range(5 * SPOILT_ANSWERS):
        now = n * limits.FETCH_PATIENCE
        assert stream.wish(now) == ("a", (4, 8))
        stream.answered(Fetched("body", "a", (4, 8)), now, spoilt=n % SPOILT_ANSWERS > 0)
    assert stream.counters.lost == 0


def test_an_answer_about_nothing_costs_nothing(stream: BodyStream) -> None:
    stream.told(extent(0, 8))
    for n in range(2 * SPOILT_ANSWERS):
        assert stream.wish(n * limits.FETCH_PAUSE)
        stream.answered(Fetched("body", "a", (4, 4)), n * limits.FETCH_PAUSE, spoilt=True)
    assert (stream.counters.lost, stream.wish(1e9)) == (0, ("a", (4, 8)))


def test_what_was_lost_beyond_where_a_trainer_stood_is_counted_once_by_whoever_goes_on(stream: BodyStream) -> None:
    stream.arrived(numbered(2, first=4), live=True)  # waits to be taken
    stream.told(extent(9, 12))
    assert stream.counters.lost == 3
    again = BodyStream(history=0)
    again.restore(stream.state())
    assert again.counters.lost == 0
    again.arrived(numbered(2, first=4), live=False)
    again.told(extent(9, 12))
    assert again.counters.lost == 3
    assert taken(stream) == taken(again) == [([4, 5], True)]
    assert stream.state()["counters"]["lost"] == 3, "what lies behind stays counted"


def test_a_refusal_right_before_where_it_stood_is_a_gap_to_whoever_goes_on(stream: BodyStream) -> None:
    stream.arrived(numbered(1, first=4), live=True)
    refused = stream.take()
    assert refused
    stream.refuse(refused[0])
    again = BodyStream(history=0)
    again.restore(stream.state())
    again.arrived(numbered(1, first=5), live=True)
    assert taken(again) == [([5], False)]


def test_a_cut_at_the_beginning_of_a_life_waits_for_the_records_of_the_life_before(stream: BodyStream) -> None:
    stream.arrived(numbered(2, first=4), live=True)
    cut = Cut("one", ("body",))
    stream.told(Extent("body", "b", (0, 0), (cut, 0)))
    assert stream.at_cut is None
    assert [numbers for numbers, _ in taken(stream)] == [[4, 5]]
    assert stream.at_cut == cut


def test_a_cut_of_an_abandoned_save_that_is_fetched_later_does_not_hide_the_present_one(stream: BodyStream) -> None:
    abandoned, present = Cut("one", ("body",)), Cut("two", ("body",))
    stream.arrived(replace(numbered(2, first=8), cut=present), live=True)
    stream.arrived(replace(numbered(2, first=6), cut=abandoned), live=False)
    stream.arrived(numbered(2, first=4), live=False)
    assert taken(stream) == [([4, 5], True), ([6, 7], True)]
    assert stream.at_cut == present
    stream.pass_cut()
    assert taken(stream) == [([8, 9], True)]


@pytest.mark.parametrize("passed", [False, True])
def test_whoever_goes_on_from_a_cut_does_not_stand_at_it_again(stream: BodyStream, passed: bool) -> None:
    cut = Cut("one", ("body",))
    stream.arrived(replace(numbered(2, first=4), cut=cut), live=True)
    assert stream.at_cut == cut
    if passed:
        stream.pass_cut()
    again = BodyStream(history=0)
    again.restore(stream.state())
    again.arrived(replace(numbered(2, first=4), cut=cut), live=False)
    assert (again.at_cut, taken(again)) == (None, [([4, 5], True)])
    again.arrived(replace(numbered(1, first=6), cut=Cut("two", ("body",))), live=True)
    assert again.at_cut == Cut("two", ("body",))


def test_an_answer_to_an_earlier_question_ends_no_later_one(stream: BodyStream) -> None:
    stream.told(extent(0, 100))
    assert stream.wish(10.0) == ("a", (4, 100))
    assert stream.wish(10.0 + limits.FETCH_PATIENCE) == ("a", (4, 100)), "nothing came: asked again"
    stream.arrived(numbered(6, first=4), False, 13.0)
    stream.answered(Fetched("body", "a", (4, 10)), 13.0)  # of the first question
    again = stream.wish(13.1)
    assert again == ("a", (10, 100))
    stream.arrived(numbered(6, first=4), False, 13.5)
    stream.answered(Fetched("body", "a", (4, 10)), 13.5)  # of the second
    assert stream.wish(13.6) is None, "the third is on its way"
    stream.arrived(numbered(90, first=10), False, 14.0)
    stream.answered(Fetched("body", "a", (10, 100)), 14.0)
    assert stream.wish(14.1) is None
    assert stream.counters.lost == 0


def test_a_body_that_comes_back_after_its_name_was_taken_does_not_silence_the_living_one(
    stream: BodyStream,
) -> None:
    """Of a it is known; b was there before it, cut off from the hub, and says something until it hears that it ends."""
    for second in range(3):
        stream.told(extent(0, 4 + second, "a"), 100.0 + second)
    stream.told(extent(0, 1_000, "b"), 103.0)
    assert stream.life is not None
    assert stream.life.incarnation == "b", "as a new life would be"
    assert not stream.arrived(numbered(3, first=4, life="a"), True, 104.0), "it may be late"
    assert stream.arrived(numbered(2, first=7, life="a"), True, 109.0), "b has been silent: it is a that lives"
    assert stream.wish(109.0) == ("a", (6, 7))
    stream.arrived(numbered(1, first=6, life="a"), False, 109.1)
    assert [numbers for numbers, _ in taken(stream)] == [[6], [7, 8]]
    assert not stream.arrived(numbered(1, first=1_000, life="b"), True, 110.0), "late now itself"


def test_after_an_hour_of_standing_still_what_is_missed_is_asked_for_soon(stream: BodyStream) -> None:
    stream.told(extent(0, 100))
    assert stream.wish(10.0) == ("a", (4, 100))
    stream.arrived(numbered(6, first=4), False, 3_610.0)  # the process was stopped, and the end of the answer is lost
    assert stream.wish(3_610.0 + limits.FETCH_LONGEST_PATIENCE) == ("a", (10, 100))
