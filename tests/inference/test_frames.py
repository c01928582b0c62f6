from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ami_inference.sensors.frames import centre_crop, to_observation
from ami_shared.errors import SensorLostError


def solid(height: int, width: int, *pixel: int) -> np.ndarray:
    return np.full((height, width, len(pixel)), pixel, np.uint8)


def test_blue_green_red_becomes_red_green_blue_first_axis() -> None:
    seen = to_observation(solid(40, 40, 10, 20, 30), 40, 40)
    assert seen.shape == (3, 40, 40)
    assert seen.dtype == np.uint8
    assert seen.flags.c_contiguous
    assert seen[:, 5, 7].tolist() == [30, 20, 10]


def test_the_colour_order_is_that_of_resized_frames_too() -> None:
    assert to_observation(solid(80, 80, 10, 20, 30), 40, 40)[:, 5, 7].tolist() == [30, 20, 10]


def test_grey_becomes_three_equal_colours() -> None:
    seen = to_observation(np.arange(16, dtype=np.uint8).reshape(4, 4), 4, 4)
    assert seen.shape == (3, 4, 4)
    np.testing.assert_array_equal(seen[0], np.arange(16).reshape(4, 4))
    assert (seen[0] == seen[1]).all()
    assert (seen[0] == seen[2]).all()


def test_transparency_is_left_out() -> None:
    assert to_observation(solid(8, 8, 10, 20, 30, 99), 4, 4)[:, 0, 0].tolist() == [30, 20, 10]


def test_left_stays_left_and_up_stays_up() -> None:
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[0, 7] = 200
    assert to_observation(frame, 8, 8)[0, 0, 7] == 200


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width", "kept"),
    [
        (480, 640, 84, 84, (0, 480, 80, 560)),
        (640, 480, 84, 84, (80, 560, 0, 480)),
        (100, 200, 50, 100, (0, 100, 0, 200)),
        (90, 160, 30, 40, (0, 90, 20, 140)),
        (3, 3, 3, 3, (0, 3, 0, 3)),
    ],
)
def test_the_centre_is_kept_in_the_target_s_aspect_ratio(
    rows: int, columns: int, height: int, width: int, kept: tuple[int, int, int, int]
) -> None:
    frame = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    top, bottom, left, right = kept
    np.testing.assert_array_equal(centre_crop(frame, height, width), frame[top:bottom, left:right])


@given(*[st.integers(1, 300)] * 4)
def test_the_crop_is_never_empty_and_as_large_as_can_be(rows: int, columns: int, height: int, width: int) -> None:
    kept_rows, kept_columns = centre_crop(np.zeros((rows, columns), np.uint8), height, width).shape
    assert 1 <= kept_rows <= rows
    assert 1 <= kept_columns <= columns
    assert kept_rows == rows or kept_columns == columns


def test_shrinking_averages_areas() -> None:
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[0, 0], frame[0, 1], frame[1, 0], frame[1, 1] = 40, 80, 120, 160
    frame[2:, 2:] = 200
    assert to_observation(frame, 2, 2)[0].tolist() == [[100, 0], [0, 200]]


def test_enlarging_keeps_the_range_and_the_size() -> None:
    frame = np.zeros((2, 2, 3), np.uint8)
    frame[0, 0] = 200
    seen = to_observation(frame, 9, 9)
    assert seen.shape == (3, 9, 9)
    assert seen[0, 0, 0] == 200
    assert seen[0, 8, 8] == 0
    assert (np.diff(seen[0, 0].astype(int)) <= 0).all()


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4,), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
    ],
    ids=lambda f: f"{f.dtype}{f.shape}",
)
@pytest.mark.parametrize("size", [4, 2])
def test_what_is_no_picture_is_a_lost_sensor_and_never_a_crash(frame: np.ndarray, size: int) -> None:
    with pytest.raises(SensorLostError, match="not a picture"):
        to_observation(frame, size, size)
