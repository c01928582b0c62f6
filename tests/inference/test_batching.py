from __future__ import annotations

import pytest

from ami_inference.batching import Batcher


@pytest.fixture
def batcher() -> Batcher[int]:
    return Batcher(count=3, age_s=0.1, nbytes=1_000, size_of=lambda item: item)


def test_a_batch_is_full_at_its_count(batcher: Batcher[int]) -> None:
    assert [batcher.add(n, now=0.0) for n in range(7)] == [None, None, [0, 1, 2], None, None, [3, 4, 5], None]


def test_a_batch_is_sent_when_its_oldest_item_is_old_enough(batcher: Batcher[int]) -> None:
    batcher.add(1, now=5.0)
    batcher.add(2, now=5.09)
    assert batcher.take_aged(5.09) is None
    assert batcher.take_aged(5.11) == [1, 2]
    assert batcher.take_aged(99.0) is None


def test_it_tells_how_long_to_wait(batcher: Batcher[int]) -> None:
    assert batcher.due_in(0.0) is None
    batcher.add(1, now=5.0)
    assert batcher.due_in(5.02) == pytest.approx(0.08)
    assert batcher.due_in(9.0) == 0.0
    batcher.flush()
    assert batcher.due_in(9.0) is None


def test_the_age_counts_anew_for_every_batch(batcher: Batcher[int]) -> None:
    batcher.add(1, now=0.0)
    batcher.flush()
    batcher.add(2, now=5.0)
    assert batcher.take_aged(5.05) is None
    assert batcher.due_in(5.05) == pytest.approx(0.05)


def test_a_flush_returns_whatever_there_is(batcher: Batcher[int]) -> None:
    assert batcher.flush() is None
    batcher.add(1, now=0.0)
    assert batcher.flush() == [1]
    assert batcher.flush() is None


def test_a_batch_is_full_at_its_bytes(batcher: Batcher[int]) -> None:
    assert [batcher.add(n, now=0.0) for n in (999, 1, 1_000, 600, 399, 2)] == [
        None,
        [999, 1],
        [1_000],
        None,
        None,
        [600, 399, 2],
    ]
