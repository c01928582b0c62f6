from __future__ import annotations

import math
import time

import numpy as np

from ami_shared import limits
from ami_shared.metrics import Curves, MetricsQueue, Picture, curves


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


def test_curves_have_points_now_and_then_where_something_has_changed() -> None:
    made = Curves()
    assert made.due(100.0)
    assert made.changed({"lost": 0, "rate_hz": 9.0}) == {"lost": 0.0, "rate_hz": 9.0}
    assert not made.due(100.0 + limits.STATISTICS_INTERVAL - 1.0)
    assert made.due(101.0 + limits.STATISTICS_INTERVAL)
    assert made.changed({"lost": 1, "rate_hz": 9.0}) == {"lost": 1.0}
    assert made.changed({"lost": 1, "rate_hz": 9.0, "steps": 3}) == {"steps": 3.0}


def test_every_number_of_statistics_is_a_curve() -> None:
    told = {
        "steps": 4, "rate_hz": 9.5, "trouble": None, "sensor": "camera 0", "alive": True, "uptime_s": 60.0,
        "links": {"control": {"state": "up", "since_s": 3.0, "lost": 2}}, "lag": {"image_encoder": 1},
    }  # fmt: skip
    assert curves(told) == {"steps": 4.0, "rate_hz": 9.5, "links/control/lost": 2.0, "lag/image_encoder": 1.0}


def test_a_picture_with_too_long_sides_is_thinned_out() -> None:
    queue = MetricsQueue()
    queue.put_picture(Picture("view", 1, np.zeros((2, 2 * limits.MAX_PICTURE_SIDE + 1, 3), np.uint8)))
    taken = queue.take_picture()
    assert taken is not None
    assert taken.pixels.shape == (1, (2 * limits.MAX_PICTURE_SIDE + 1 + 2) // 3, 3)
    assert taken.pixels.nbytes < limits.MAX_CONTROL_FRAME_BYTES
