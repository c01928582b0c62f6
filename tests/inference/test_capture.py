"""The capture thread with a source whose every frame the test hands out."""

from __future__ import annotations

import math
import os
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ami_inference.sensors import NoiseSensor, OpenCVImageSensor, capture, opencv_image
from ami_inference.sensors.capture import Capture
from ami_shared.errors import AmiError, ConfigurationError, SensorLostError
from ami_shared.wire import Array
from manual_clock import ManualClock

PollFor = Callable[..., Any]


def frame(value: int) -> Array:
    return np.full((2, 2, 3), value, np.uint8)


class Camera:
    """Opens as often as it is told to, and delivers what it is given; None ends the stream."""

    def __init__(self) -> None:
        self.frames: queue.Queue[Array | None] = queue.Queue()
        self.absent = False
        self.opened: list[float] = []
        self.released = 0

    def open(self) -> Camera:
        self.opened.append(time.monotonic())
        if self.absent:
            raise SensorLostError("no such camera")
        return self

    def read(self) -> Array | None:
        return self.frames.get(timeout=10)

    def release(self) -> None:
        self.released += 1


class Rig:
    def __init__(self, **options: Any) -> None:
        self.camera, self.clock = Camera(), ManualClock()
        settings: dict[str, Any] = {"freeze_after_s": 2.0, "clock": self.clock, **options}
        self.capture = Capture("camera 7", self.camera.open, **settings)

    def deliver(self, value: int, poll_for: PollFor) -> None:
        before = self.capture.frames
        self.camera.frames.put(frame(value))
        poll_for(lambda: self.capture.frames > before)

    def lose(self, poll_for: PollFor) -> None:
        before = self.capture.losses
        self.camera.frames.put(None)
        poll_for(lambda: self.capture.losses > before and self.lost())

    def live(self, begin: float, end: float, value: int, poll_for: PollFor) -> None:
        """Look once a second, and be shown the same picture every time, up to the last second."""
        for self.clock.now in np.arange(begin, end + 0.5):
            self.lost()
            self.deliver(value, poll_for)

    def lost(self) -> str | None:
        try:
            self.capture.newest()
        except SensorLostError as error:
            return str(error)
        return None


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    monkeypatch.setattr(capture, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(capture, "LONGEST_RETRY_S", 0.1)
    made: list[Rig] = []

    def rig(**options: Any) -> Rig:
        made.append(Rig(**options))
        made[-1].capture.start()
        return made[-1]

    yield rig
    for each in made:
        each.capture._ending.set()
        each.camera.frames.put(None)
        each.capture.close()
        each.capture.join(30.0)
        assert not each.capture.is_alive()


def test_before_the_first_frame_there_is_nothing(make: Callable[..., Rig]) -> None:
    assert make().lost() == "camera 7 has not delivered a frame yet"


def test_only_the_newest_frame_is_kept(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make()
    for value in (1, 2, 3):
        rig.clock.now = float(value)
        rig.deliver(value, poll_for)
    newest = rig.capture.newest()
    assert (newest.frame[0, 0, 0], newest.at, newest.stretch) == (3, 3.0, 0)
    assert rig.capture.newest() is newest


def test_a_source_that_ends_is_lost_opened_again_and_begins_a_new_stretch(
    make: Callable[..., Rig], poll_for: PollFor, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make()
    rig.deliver(1, poll_for)
    rig.lose(poll_for)
    assert rig.lost() == "camera 7 stopped delivering frames"
    assert rig.camera.released == 1
    rig.deliver(2, poll_for)
    assert rig.capture.newest().stretch == 1
    assert len(rig.camera.opened) == 2
    assert [r.levelname for r in caplog.records].count("WARNING") == 1


def test_a_source_without_a_new_frame_is_lost_until_the_next_one(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make()
    rig.deliver(1, poll_for)
    rig.clock.now = 2.0
    assert rig.lost() is None
    rig.clock.now = 2.1
    assert rig.lost() == "camera 7 has delivered no frame for 2.1 s"
    rig.deliver(2, poll_for)
    assert rig.capture.newest().stretch == 1
    assert len(rig.camera.opened) == 1


def test_a_gap_that_nobody_noticed_is_no_new_stretch(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make()
    rig.deliver(1, poll_for)
    rig.clock.now = 9.0
    rig.deliver(2, poll_for)
    assert rig.capture.newest().stretch == 0


def test_a_picture_that_stands_still_for_too_long_is_frozen(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make(same_picture_after_s=30.0)
    rig.live(0, 30, 5, poll_for)
    assert rig.lost() is None
    rig.clock.now = 31.0
    rig.camera.frames.put(frame(5))
    assert poll_for(rig.lost) == "camera 7 shows the same picture for 31 s"


def test_a_picture_that_stands_still_while_nobody_looks_is_not_frozen(
    make: Callable[..., Rig], poll_for: PollFor
) -> None:
    """During a pause the avatar stands still: in a quiet place nothing else moves the picture."""
    rig = make(same_picture_after_s=30.0)
    rig.live(0, 10, 5, poll_for)
    for rig.clock.now in (20.0, 60.0, 1_000.0):
        rig.deliver(5, poll_for)
    assert rig.lost() is None
    rig.live(1_001, 1_029, 5, poll_for)
    assert rig.lost() is None


def test_a_frozen_picture_is_believed_now_and_then_for_only_who_moves_sees_whether_it_lives(
    make: Callable[..., Rig], poll_for: PollFor
) -> None:
    rig = make(same_picture_after_s=30.0)
    rig.live(0, 30, 5, poll_for)
    for begin, doubted in ((31.0, 30.0), (63.5, 60.0)):
        rig.clock.now = begin
        rig.camera.frames.put(frame(5))
        assert "the same picture" in poll_for(rig.lost)
        rig.clock.now = begin + doubted
        rig.live(begin + doubted, begin + doubted + 1, 5, poll_for)
        assert rig.lost() is None
    rig.live(126, 130, 6, poll_for)
    assert rig.lost() is None


def test_a_frozen_picture_has_not_returned_by_opening_the_camera_again(
    make: Callable[..., Rig], poll_for: PollFor
) -> None:
    rig = make(same_picture_after_s=30.0)
    rig.live(0, 30, 5, poll_for)
    rig.clock.now = 31.0
    for opened in (1, 2, 3):
        rig.camera.frames.put(frame(5))
        poll_for(lambda n=opened: rig.camera.released == n)
        poll_for(lambda: rig.lost() == "camera 7 shows the same picture for 31 s")
    rig.deliver(6, poll_for)
    assert rig.capture.newest().stretch == 1


def test_one_changed_pixel_is_another_picture(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make(same_picture_after_s=1.0)
    for n in range(5):
        rig.clock.now = n * 0.9
        changed = frame(5)
        changed[1, 1, 2] = n
        rig.camera.frames.put(changed)
        poll_for(lambda n=n: rig.capture.frames == n + 1)
    assert rig.lost() is None


def test_standing_still_is_no_fault_unless_asked_for(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make()
    for rig.clock.now in (0.0, 1_000.0, 2_000.0):
        rig.deliver(5, poll_for)
    assert rig.lost() is None


def test_an_absent_camera_is_tried_less_and_less_often_and_said_once(
    make: Callable[..., Rig], poll_for: PollFor, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make()
    rig.camera.absent = True
    rig.camera.frames.put(None)
    poll_for(lambda: len(rig.camera.opened) >= 6)
    assert rig.lost() == "no such camera"
    assert (np.diff(rig.camera.opened[:6]) >= [0.02, 0.04, 0.08, 0.1, 0.1]).all()
    assert len([line for line in caplog.messages if "no such camera" in line]) == 1


def test_the_back_off_begins_anew_after_a_frame(
    make: Callable[..., Rig], poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    waited, wait = list[Any](), rig.capture._ending.wait
    monkeypatch.setattr(rig.capture._ending, "wait", lambda retry_s: waited.append(retry_s) or wait(retry_s))
    rig.camera.frames.put(None)
    rig.camera.absent = True
    poll_for(lambda: len(rig.camera.opened) >= 6)
    rig.camera.absent = False
    rig.deliver(1, poll_for)
    before = len(waited)
    rig.lose(poll_for)
    poll_for(lambda: len(waited) > before)
    assert waited[before - 1] > capture.FIRST_RETRY_S
    assert waited[before] == capture.FIRST_RETRY_S


def test_a_source_that_breaks_in_its_own_way_is_lost_and_opened_again(
    make: Callable[..., Rig], poll_for: PollFor
) -> None:
    rig = make()
    rig.deliver(1, poll_for)
    rig.camera.read = _broken  # type: ignore[method-assign]
    rig.camera.frames.put(frame(2))  # the read that is under way
    poll_for(lambda: rig.lost())
    del rig.camera.read
    rig.deliver(3, poll_for)
    assert rig.capture.newest().stretch == 1


def _broken() -> Array | None:
    raise cv2.error("Unknown C++ exception from OpenCV code")


def test_a_driver_that_hangs_holds_nobody(make: Callable[..., Rig]) -> None:
    rig = make()
    begin = time.monotonic()
    rig.capture.close()
    assert time.monotonic() - begin < 9.0


def test_only_a_new_process_opens_a_camera_whose_driver_hangs(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make()
    rig.deliver(1, poll_for)
    rig.lost()
    for second in range(1, int(capture.HANG_S)):
        rig.clock.now += 1.0
        told = rig.lost()
        assert second < 3 or "no frame for" in str(told)
    rig.clock.now += 5.0
    with pytest.raises(AmiError, match="its driver has hung for 60 s; restart this service"):
        rig.capture.newest()


def test_a_driver_is_not_blamed_for_a_process_that_was_stopped(make: Callable[..., Rig], poll_for: PollFor) -> None:
    rig = make()
    rig.deliver(1, poll_for)
    rig.lost()
    rig.clock.now += 3_600.0
    assert "no frame for 3600" in str(rig.lost())
    rig.clock.now += 5.0
    assert rig.lost()
    rig.deliver(2, poll_for)
    assert rig.lost() is None


# The same with OpenCV itself, whose camera may be a file.


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, (64, 48))
    for n in range(40):
        writer.write(np.full((48, 64, 3), (0, 0, 5 * n), np.uint8))
    writer.release()
    return path


def test_a_camera_s_frames_become_observations_and_its_end_a_new_stretch(
    video: Path, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "FIRST_RETRY_S", 0.02)
    sensor = OpenCVImageSensor(str(video), height=36, width=36)

    def see() -> Any:
        try:
            return sensor.read()
        except SensorLostError:
            return None

    try:
        observation = poll_for(see)
        assert observation.values.shape == (3, 36, 36)
        assert observation.values.dtype == np.uint8
        assert observation.values[2].mean() < 20  # no blue: the picture is red in its brightest
        assert 0 <= observation.age_s < 2.0
        first = observation.stretch
        poll_for(lambda: (seen := see()) and seen.stretch > first)
        told = sensor.statistics()
        assert "clip.avi" in told["sensor"]
        assert told["frames"] >= 40
        assert told["camera_losses"] >= 1
    finally:
        sensor.close()


def test_a_camera_that_is_not_there_is_lost_and_says_which(tmp_path: Path, poll_for: PollFor) -> None:
    (tmp_path / "odd.avi").write_text("no video")
    for name, why in [("odd.avi", "cannot be opened"), ("OBS Virtual Camera", "is not an index, a URL")]:
        sensor = OpenCVImageSensor(str(tmp_path / name), height=36, width=36)
        try:
            poll_for(lambda seen=sensor: seen.statistics()["camera_losses"])
            with pytest.raises(SensorLostError, match=rf"{name}' {why}"):
                sensor.read()
        finally:
            sensor.close()


def test_without_a_camera_it_is_said_how_to_find_one() -> None:
    with pytest.raises(ConfigurationError, match=r"sensor\.camera is not set: `ami doctor experiment="):
        OpenCVImageSensor(None, height=36, width=36)


@pytest.mark.parametrize("camera", [-1, True, 1.5, float("nan"), "", [0]], ids=repr)
def test_what_is_no_camera_is_never_opened(camera: Any) -> None:
    """OpenCV takes a negative index for any camera, perhaps that of the room, and may crash."""
    with pytest.raises(ConfigurationError, match=r"sensor\.camera=.* must be an index, 0 or more"):
        OpenCVImageSensor(camera, height=36, width=36)


@pytest.mark.parametrize("height", [None, "abc", -1, 0, 0.5, 42.0, float("nan"), True, 5_000], ids=repr)
@pytest.mark.parametrize("sensor", [partial(OpenCVImageSensor, 0), NoiseSensor], ids=["camera", "noise"])
def test_a_size_that_is_none_is_refused_before_the_first_frame(sensor: Callable[..., Any], height: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"sensor: height=.* must be 1 to 4096 pixels"):
        sensor(height=height, width=36)


def test_an_index_that_has_become_another_camera_s_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, poll_for: PollFor, caplog: pytest.LogCaptureFixture
) -> None:
    """Its frames would be those of a webcam, for weeks."""
    with device(monkeypatch) as (sensor, frames):
        for picture in [picture_of(72, 72, 1), picture_of(72, 72, 2), None, picture_of(48, 64, 3), None]:
            frames.put(picture)
        frames.put(picture_of(48, 64, 4))
        poll_for(lambda: "64x48 pixels, and had 72x72" in str(_trouble(sensor)))
        assert sensor.statistics()["frames"] == 2
        frames.put(picture_of(72, 72, 5))
        poll_for(lambda: _trouble(sensor) is None)
    told = [line for line in caplog.messages if "camera lost" in line]
    assert len([line for line in told if "may be another camera's now" in line]) == 1, "not again at each retry"


def test_a_still_placeholder_does_not_say_what_size_the_camera_has(
    monkeypatch: pytest.MonkeyPatch, poll_for: PollFor
) -> None:
    """OBS's camera shows one until OBS runs, which may have another canvas."""
    with device(monkeypatch) as (sensor, frames):
        for picture in [*[picture_of(1080, 1920, 7)] * 3, None, picture_of(720, 720, 1), picture_of(720, 720, 2)]:
            frames.put(picture)
        poll_for(lambda: sensor.statistics()["frames"] == 5)
        frames.put(None)
        frames.put(picture_of(1080, 1920, 8))
        poll_for(lambda: "1920x1080 pixels, and had 720x720" in str(_trouble(sensor)))


def picture_of(height: int, width: int, value: int) -> Array:
    return np.full((height, width, 3), value, np.uint8)


@contextmanager
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[OpenCVImageSensor, queue.Queue[Array | None]]]:
    """Yield the sensor of a numbered device, and the queue of what its driver delivers."""
    monkeypatch.setattr(capture, "FIRST_RETRY_S", 0.02)
    frames: queue.Queue[Array | None] = queue.Queue()

    class Driver:
        def __init__(self, *_: Any) -> None: ...

        def read(self) -> Array | None:
            return frames.get(timeout=30)

        def release(self) -> None: ...

    monkeypatch.setattr(opencv_image, "OpenCVSource", Driver)
    sensor = OpenCVImageSensor(0, height=36, width=36, freeze_after=600.0)
    try:
        yield sensor, frames
    finally:
        frames.put(None)
        sensor.close()


class Slow:
    """A device's cv2.VideoCapture that delivers its first frame after a few reads in vain, and then dies."""

    def __init__(self) -> None:
        self.reads = 0

    def open(self, *_: Any) -> bool:
        return True

    def set(self, *_: Any) -> bool:
        return True

    def read(self) -> tuple[bool, Array | None]:
        self.reads += 1
        return (True, frame(1)) if self.reads == 4 else (False, None)

    def release(self) -> None: ...


def test_a_device_of_directshow_may_be_slow_with_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opencv_image, "CAMERAS", cv2.CAP_DSHOW)
    monkeypatch.setattr(opencv_image, "SLOW_FRAME_S", 30.0)
    monkeypatch.setattr(cv2, "VideoCapture", Slow)
    source = opencv_image.OpenCVSource(0, {})
    assert source.read() is not None
    source._patience_s = 0.5
    begin = time.monotonic()
    assert source.read() is None
    assert 0.4 < time.monotonic() - begin < 30.0


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals as devices here")
def test_a_device_that_says_nothing_is_no_driver_that_hangs(poll_for: PollFor) -> None:
    """As /dev/video0 while OBS, which fills it, does not run."""
    master, slave = os.openpty()
    sensor = OpenCVImageSensor(os.ttyname(slave), height=36, width=36)
    try:
        poll_for(lambda: sensor.statistics()["camera_losses"], 10.0)
        assert "cannot be opened" in str(_trouble(sensor))
    finally:
        sensor.close()
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(
    ("camera", "options", "told"),
    [
        (0, {"capture_width": 1280}, "both capture_width and capture_height"),
        (0, {"capture_height": 720}, "both capture_width and capture_height"),
        ("http://me:secret@h/x", {"frame_rate": 30.0}, r"are for devices: camera 'http://me:\*\*\*@h/x'"),
        ("clip.avi", {"capture_width": 1280, "capture_height": 720}, "are for devices: camera 'clip.avi'"),
    ],
)
def test_what_would_have_no_effect_is_a_configuration_error(
    camera: int | str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        OpenCVImageSensor(camera, height=36, width=36, **options)


def test_a_camera_s_password_is_shown_to_nobody(poll_for: PollFor, caplog: pytest.LogCaptureFixture) -> None:
    sensor = OpenCVImageSensor("rtsp://me:secret@127.0.0.1:1/live", height=36, width=36)
    try:
        poll_for(lambda: sensor.statistics()["camera_losses"])
        poll_for(lambda: "camera lost" in caplog.text)
        told = f"{_trouble(sensor)} {sensor.statistics()} {caplog.text}"
    finally:
        sensor.close()
    assert "me:***@127.0.0.1:1/live" in told
    assert "secret" not in told


def _trouble(sensor: OpenCVImageSensor) -> SensorLostError | None:
    try:
        sensor.read()
    except SensorLostError as error:
        return error
    return None


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, "abc", True])
@pytest.mark.parametrize("name", ["freeze_after", "same_picture_after"])
def test_a_patience_that_is_none_is_a_configuration_error(name: str, seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"sensor\.{name}=.* seconds above 0"):
        OpenCVImageSensor("none.avi", height=36, width=36, **{name: seconds})


def test_a_camera_is_given_up_at_some_time() -> None:
    with pytest.raises(ConfigurationError, match="freeze_after=None"):
        OpenCVImageSensor("none.avi", height=36, width=36, freeze_after=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "dialled"),
    [
        ("http://0.0.0.0:8080/video.mjpg", "http://127.0.0.1:8080/video.mjpg"),
        ("rtsp://0.0.0.0/live", "rtsp://127.0.0.1/live"),
        ("http://0.0.0.0.example/x", "http://0.0.0.0.example/x"),
        ("tcp://0.0.0.0:9999?listen=1", "tcp://0.0.0.0:9999?listen=1"),
        ("http://0.0.0.0:9999?listen=1", "http://0.0.0.0:9999?listen=1"),
        ("http://10.0.0.0:80/", "http://10.0.0.0:80/"),
    ],
)
def test_what_listens_everywhere_is_dialled_on_this_machine(url: str, dialled: str) -> None:
    assert opencv_image._dialled(url) == dialled
