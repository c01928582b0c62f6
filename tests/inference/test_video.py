from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ami_inference.sensors import NoiseSensor, VideoSensor
from ami_shared.errors import ConfigurationError


def write_video(path: Path, brightnesses: list[int]) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, (48, 48))
    assert writer.isOpened()
    for brightness in brightnesses:
        writer.write(np.full((48, 48, 3), brightness, np.uint8))
    writer.release()
    return path


def seen(sensor: VideoSensor, count: int) -> list[tuple[int, int]]:
    """Brightness, rounded to tens, and stretch of the next observations."""
    observations = [sensor.read() for _ in range(count)]
    return [(round(o.values.mean() / 10) * 10, o.stretch) for o in observations]


def test_a_video_plays_over_and_over_and_each_time_is_a_stretch(tmp_path: Path) -> None:
    sensor = VideoSensor(str(write_video(tmp_path / "a.avi", [50, 100, 150])), 36, 36)
    assert seen(sensor, 7) == [(50, 0), (100, 0), (150, 0), (50, 1), (100, 1), (150, 1), (50, 2)]
    sensor.close()


def test_a_folder_plays_in_the_order_of_names_and_each_file_is_a_stretch(tmp_path: Path) -> None:
    write_video(tmp_path / "b.avi", [200])
    write_video(tmp_path / "a.AVI".lower(), [50, 100])
    (tmp_path / "notes.txt").write_text("no video")
    sensor = VideoSensor(str(tmp_path), 36, 36)
    assert seen(sensor, 5) == [(50, 0), (100, 0), (200, 1), (50, 2), (100, 2)]
    sensor.read()
    assert sensor.statistics() == {"sensor": "video b.avi"}
    sensor.close()


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("shown", [0, 2, 3, 4])
def test_a_restored_body_goes_on_where_it_was_in_its_videos(tmp_path: Path, shown: int, every: int, files: int) -> None:
    for name, frames in [("a", [10, 20, 30, 40, 50]), ("b", [100, 120])][:files]:
        write_video(tmp_path / f"{name}.avi", frames)
    first, again, gone = (VideoSensor(str(tmp_path), 36, 36, every) for _ in range(3))
    seen(first, shown)
    again.restore(first.state())
    assert again.state() == first.state(), "also of a body that is saved before it has looked"
    assert [b for b, _ in seen(again, 6)] == [b for b, _ in seen(first, 6)]
    gone.restore({"file": "deleted.avi", "frame": 7})
    assert seen(gone, 1) == [(10 * every, 0)]
    for sensor in (first, again, gone):
        sensor.close()


def test_every_third_frame_is_taken(tmp_path: Path) -> None:
    sensor = VideoSensor(str(write_video(tmp_path / "a.avi", [10, 20, 30, 40, 50, 60, 70])), 36, 36, every=3)
    assert seen(sensor, 3) == [(30, 0), (60, 0), (30, 1)]
    sensor.close()


def test_observations_have_the_agent_s_size(tmp_path: Path) -> None:
    sensor = VideoSensor(str(write_video(tmp_path / "a.avi", [10])), 40, 60)
    assert sensor.read().values.shape == (3, 40, 60)
    sensor.close()


@pytest.mark.parametrize("every", [0, -3, 2.5, "2", True, None])
def test_every_nth_frame_is_a_whole_number(every: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"sensor\.every=.* must be a whole number"):
        VideoSensor(str(write_video(tmp_path / "a.avi", [10])), 36, 36, every)


def test_no_video_is_a_configuration_error_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path / "none.avi", tmp_path):
        with pytest.raises(ConfigurationError, match=r"no video at .*sensor\.path"):
            VideoSensor(str(path), 36, 36)


def test_a_file_that_is_no_video_is_a_configuration_error_and_not_an_endless_search(tmp_path: Path) -> None:
    path = tmp_path / "broken.avi"
    path.write_bytes(b"this is not a video" * 100)
    sensor = VideoSensor(str(path), 36, 36)
    with pytest.raises(ConfigurationError, match=r"broken\.avi"):
        sensor.read()
    sensor.close()


def test_noise_is_new_at_every_step_and_the_same_for_one_seed() -> None:
    first, again, other = NoiseSensor(5, 7, seed=1), NoiseSensor(5, 7, seed=1), NoiseSensor(5, 7, seed=2)
    one, two = first.read(), first.read()
    assert one.values.shape == (3, 5, 7)
    assert one.values.dtype == np.uint8
    assert one.stretch == two.stretch
    assert not np.array_equal(one.values, two.values)
    np.testing.assert_array_equal(again.read().values, one.values)
    assert not np.array_equal(other.read().values, one.values)
    first.close()


def test_noise_has_every_brightness() -> None:
    image = NoiseSensor(84, 84).read().values
    assert len(np.unique(image)) == 256
    assert image.mean() == pytest.approx(127.5, abs=2)
