from __future__ import annotations

import numpy as np
import pytest

from ami_shared.errors import ConfigurationError, WireError
from ami_trainer.buffers.random_image import RandomImageBuffer


def numbered(first: int, count: int) -> np.ndarray:
    """Frames whose red and green pixels are the bytes of their number."""
    frames = [np.array([n % 256, n // 256, 0]).astype(np.uint8) for n in range(first, first + count)]
    return np.stack([np.broadcast_to(frame[:, None, None], (3, 2, 2)) for frame in frames])


def test_it_keeps_a_uniform_sample_of_everything_seen() -> None:
    kept = np.zeros(200)
    for seed in range(300):
        buffer = RandomImageBuffer(20, 2, 2, seed=seed)
        buffer.add(numbered(0, 200))
        buffer.take_fresh()
        kept[np.unique(buffer.sample(2_000)[:, 0, 0, 0])] += 1
    expected = 300 * 20 / 200
    assert abs(kept[:20].mean() - expected) < 4
    assert abs(kept[-20:].mean() - expected) < 4
    assert kept.sum() == pytest.approx(300 * 20, rel=0.01)


def ages(buffer: RandomImageBuffer, newest: int) -> np.ndarray:
    frames = buffer.spread(len(buffer))
    return newest - (frames[:, 0, 0, 0].astype(int) + 256 * frames[:, 1, 0, 0].astype(int))


def test_after_its_memory_it_forgets_at_a_steady_rate() -> None:
    old = list[float]()
    for seed in range(100):
        buffer = RandomImageBuffer(50, 2, 2, seed=seed, memory=500)
        buffer.add(numbered(0, 6_000))
        buffer.take_fresh()
        old.append(ages(buffer, 5_999).mean())
    assert np.mean(old) == pytest.approx(500, rel=0.1), "each survives so many new frames on average"


def test_a_long_life_s_sample_takes_up_what_is_new() -> None:
    """A uniform sample of a life of months would hold 4 % of it."""
    buffer = RandomImageBuffer(100, 2, 2, memory=1_000)
    buffer.add(numbered(0, 100))
    buffer.restore({**buffer.state(), "seen": 26_000, "fresh_count": 0})
    assert buffer.statistics()["kind"] == "a memory of 1000 frames"
    buffer.add(numbered(26_000, 1_000))
    buffer.take_fresh()
    assert (ages(buffer, 26_999) < 1_000).mean() > 0.5


def test_a_memory_smaller_than_the_buffer_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="a buffer of 20 frames cannot have a memory of 19"):
        RandomImageBuffer(20, 2, 2, memory=19)


@pytest.mark.parametrize("capacity", [2, 3, 8])
def test_fresh_frames_outlive_a_change_of_their_number(capacity: int) -> None:
    before = RandomImageBuffer(8, 2, 2, fresh_capacity=4)
    before.add(numbered(0, 7))
    after = RandomImageBuffer(8, 2, 2, fresh_capacity=capacity)
    after.restore(before.state())
    assert after.take_fresh()[:, 0, 0, 0].tolist() == [3, 4, 5, 6][-capacity:]


def test_fresh_frames_are_handed_out_once_oldest_first() -> None:
    buffer = RandomImageBuffer(4, 2, 2, fresh_capacity=3)
    buffer.add(numbered(0, 2))
    assert buffer.take_fresh()[:, 0, 0, 0].tolist() == [0, 1]
    assert len(buffer.take_fresh()) == 0
    buffer.add(numbered(2, 5))
    assert buffer.take_fresh()[:, 0, 0, 0].tolist() == [4, 5, 6]


def test_fresh_frames_are_not_drawn_before_they_were_handed_out_or_were_too_many() -> None:
    buffer = RandomImageBuffer(8, 2, 2, fresh_capacity=3)
    buffer.add(numbered(1, 2))
    buffer.take_fresh()
    buffer.add(numbered(3, 4))
    assert set(buffer.sample(200)[:, 0, 0, 0].tolist()) == {1, 2, 3}
    assert (len(buffer), buffer.seen) == (6, 6)
    assert buffer.take_fresh()[:, 0, 0, 0].tolist() == [4, 5, 6]
    assert set(buffer.sample(300)[:, 0, 0, 0].tolist()) == {1, 2, 3, 4, 5, 6}


def test_samples_are_copies() -> None:
    buffer = RandomImageBuffer(4, 2, 2)
    buffer.add(numbered(7, 1))
    buffer.take_fresh()
    buffer.sample(1)[:] = 0
    assert buffer.sample(1)[0, 0, 0, 0] == 7


@pytest.mark.parametrize("frames", [np.zeros((1, 3, 2, 3), np.uint8), np.zeros((1, 3, 2, 2), np.float32)])
def test_frames_of_another_kind_are_refused(frames: np.ndarray) -> None:
    buffer = RandomImageBuffer(4, 2, 2)
    with pytest.raises(WireError, match="observation"):
        buffer.add(frames)
    assert len(buffer) == 0


def test_an_enlarged_buffer_grows_at_the_rate_that_the_smaller_one_kept_of_the_past() -> None:
    kept = np.zeros(400)
    for seed in range(200):
        small = RandomImageBuffer(20, 2, 2, seed=seed)
        small.add(numbered(0, 200))
        small.take_fresh()
        large = RandomImageBuffer(400, 2, 2)
        large.restore(small.state())
        large.add(numbered(200, 200))
        large.take_fresh()
        frames = large.spread(len(large))
        kept[frames[:, 0, 0, 0].astype(int) + 256 * frames[:, 1, 0, 0].astype(int)] += 1
    early, late = kept[:200].mean(), kept[200:].mean()
    assert early == pytest.approx(200 * 20 / 200, abs=0.01)
    assert late == pytest.approx(early, rel=0.1), "each frame of the past with equal probability"
