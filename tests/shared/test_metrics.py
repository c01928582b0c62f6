from __future__ import annotations

import math
import time

import numpy as np

from ami_shared.metrics import MetricsQueue, Picture


def picture(step: int) -> Picture:
    return Picture("view", step, np.zeros((2, 2, 3), np.uint8))


def test_points_come_out_in_order_with_step_and_time() -> None:
    queue = MetricsQueue()
    queue.put(3, {"loss": 0.5, "kl": np.float32(2.0)})
    queue.put(4, {"loss": math.inf})
    points = queue.take()
    assert [(name, value, step) for name, value, step, _ in points] == [
        ("loss", 0.5, 3),
        ("kl", 2.0, 3),
        ("loss", math.inf, 4),
    ]
    assert all(type(value) is float and abs(when - time.time()) < 5 for _, value, _, when in points)
    assert queue.take() == []


def test_a_full_queue_drops_the_oldest_and_counts_them() -> None:
    queue = MetricsQueue(capacity=3)
    for step in range(5):
        queue.put(step, {"x": float(step)})
    assert [step for _, _, step, _ in queue.take()] == [2, 3, 4]
    assert queue.dropped == 2


def test_no_more_is_taken_than_asked_for() -> None:
    queue = MetricsQueue()
    queue.put(0, {str(i): 0.0 for i in range(5)})
    assert len(queue.take(at_most=2)) == 2
    assert [name for name, *_ in queue.take()] == ["2", "3", "4"]


def test_only_the_last_pictures_are_kept() -> None:
    queue = MetricsQueue()
    for step in range(6):
        queue.put_picture(picture(step))
    taken = [p.step for _ in range(5) if (p := queue.take_picture())]
    assert taken == [2, 3, 4, 5]
    assert queue.dropped == 2
    assert queue.take_picture() is None
