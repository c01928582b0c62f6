from __future__ import annotations

from ami_inference.retained import FRAME_OVERHEAD_BYTES, Retained, SentBatch
from ami_shared.experience import Place

SIZE = 1_000
COST = SIZE + FRAME_OVERHEAD_BYTES


def filled(*ranges: tuple[int, int], capacity: int = 10) -> Retained:
    """A ring for so many batches of one frame each."""
    ring = Retained(capacity * COST)
    for part in ranges:
        ring.add(SentBatch(part, (bytes(SIZE),), position=0), gone=0)
    return ring


def test_what_is_told_by_its_place_costs_an_answer_nothing() -> None:
    ring = Retained(10 * COST)
    for first in (0, 4):
        place = Place((first, first + 4), ((0, SIZE),))
        ring.add(SentBatch(place.range, (bytes(SIZE),), position=0, place=place), gone=0)
    ring.add(SentBatch((8, 12), (bytes(SIZE),), position=0), gone=0)
    ring.add(SentBatch((12, 16), (bytes(SIZE),), position=0), gone=0)
    assert ring.answer((0, 16), 1, 100).range == (0, 4)
    assert ring.answer((0, 16), COST, 100, by_place=True).range == (0, 12)


def ranges_of(ring: Retained, first: int, end: int, nbytes: int = 1 << 30, batches: int = 100) -> list[object]:
    answer = ring.answer((first, end), nbytes, batches)
    return [[batch.range for batch in answer.batches], answer.range, list(answer.gone)]


def test_it_holds_the_newest_within_its_bytes() -> None:
    ring = filled((0, 4), (4, 8), (8, 10), capacity=2)
    assert ring.range == (4, 10)
    assert ring.statistics() == {"records": 6, "bytes": 2 * COST, "capacity_bytes": 2 * COST}


def test_a_batch_larger_than_the_ring_is_held_alone() -> None:
    ring = Retained(10)
    ring.add(SentBatch((0, 1), (bytes(SIZE),), position=0), gone=0)
    ring.add(SentBatch((1, 2), (bytes(SIZE),), position=0), gone=0)
    assert ring.range == (1, 2)


def test_what_has_been_written_over_is_held_no_longer() -> None:
    ring = Retained(1 << 20)
    for n in range(4):
        ring.add(SentBatch((n, n + 1), (bytes(SIZE),), position=n * SIZE), gone=max(0, (n - 2) * SIZE))
    assert ring.range == (1, 4)
    ring.add(SentBatch((4, 5), (bytes(SIZE),), position=4 * SIZE), gone=1 << 40)
    assert ring.range == (4, 5), "the last one stays"


def test_what_was_never_sent_moves_the_end_and_lets_go_of_what_it_has_written_over() -> None:
    ring = Retained(1 << 20)
    for n in range(4):
        ring.add(SentBatch((n, n + 1), (bytes(SIZE),), position=n * SIZE), gone=0)
    ring.skip_to(6, gone=2 * SIZE)
    assert ring.range == (2, 6)
    assert ring.statistics()["records"] == 2
    assert ranges_of(ring, 0, 6) == [[(2, 3), (3, 4)], (0, 4), [(0, 2)]]
    assert ranges_of(ring, 4, 6) == [[], (4, 6), [(4, 6)]]
    ring.skip_to(7, gone=9 * SIZE)
    assert ring.range == (7, 7)
    assert ranges_of(ring, 2, 7) == [[], (2, 7), [(2, 7)]]


def test_a_range_is_answered_with_the_batches_that_cover_it() -> None:
    ring = filled((0, 4), (4, 8), (8, 10))
    assert ranges_of(ring, 4, 8) == [[(4, 8)], (4, 8), []]
    assert ranges_of(ring, 5, 9) == [[(4, 8), (8, 10)], (5, 9), []]
    assert ranges_of(ring, 0, 99) == [[(0, 4), (4, 8), (8, 10)], (0, 10), []]


def test_what_is_gone_is_told() -> None:
    ring = filled((0, 4), (4, 8), (8, 10), (15, 20), capacity=3)
    assert ranges_of(ring, 0, 20) == [[(4, 8), (8, 10), (15, 20)], (0, 20), [(0, 4), (10, 15)]]
    assert ranges_of(ring, 0, 3) == [[], (0, 3), [(0, 3)]]
    assert ranges_of(ring, 11, 14) == [[], (11, 14), [(11, 14)]]


def test_an_answer_is_bounded_but_never_empty() -> None:
    ring = filled((0, 4), (4, 8), (8, 10))
    assert ranges_of(ring, 0, 10, nbytes=1) == [[(0, 4)], (0, 4), []]
    assert ranges_of(ring, 0, 10, nbytes=2 * COST) == [[(0, 4), (4, 8)], (0, 8), []]
    assert ranges_of(ring, 0, 10, batches=1) == [[(0, 4)], (0, 4), []]


def test_of_what_is_not_there_yet_nothing_is_said() -> None:
    assert ranges_of(filled((0, 4)), 4, 9) == [[], (4, 4), []]
    assert ranges_of(filled(), 0, 9) == [[], (0, 0), []]
