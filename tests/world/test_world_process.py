from __future__ import annotations

import math
import os
import signal
import socket
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pytest

if TYPE_CHECKING:
    from conftest import RunningWorld

    StartWorld = Callable[..., RunningWorld]

pytestmark = pytest.mark.filterwarnings("error")


def place(state: dict[str, Any]) -> tuple[float, float]:
    return state["position"]["x"], state["position"]["y"]


def test_the_camera_opens_like_any_other_and_follows_the_avatar(world: RunningWorld) -> None:
    camera = cv2.VideoCapture(world.url + "/video.mjpg")
    try:
        _, first = camera.read()
        assert first.shape == (240, 320, 3)
        world.send("/input/LookHorizontal", 1.0)
        world.wait_until(lambda: cv2.absdiff(camera.read()[1], first).mean() > 5)
    finally:
        camera.release()


def test_a_full_look_axis_turns_right_until_it_is_let_go(world: RunningWorld) -> None:
    world.send("/input/LookHorizontal", 1.0)
    world.wait_until(lambda: world.state()["inputs"]["look_horizontal"] == 1.0)
    before = world.state()
    after = world.wait_until(lambda: (s := world.state())["tics"] >= before["tics"] + 20 and s)
    turned, expected = before["angle_deg"] - after["angle_deg"], 120 / 35 * (after["tics"] - before["tics"])
    assert (turned - expected + 180) % 360 - 180 == pytest.approx(0, abs=8)
    world.settle()
    assert world.state()["inputs"]["look_horizontal"] == 0.0


def test_walking_moves_the_avatar_and_explores(world: RunningWorld) -> None:
    before = world.state()
    for sign in (1.0, -1.0):
        world.send("/input/Vertical", sign)
        world.wait_until(lambda: math.dist(place(world.state()), place(before)) > 40)
    after = world.state()
    assert before["explored_cells"] >= 1
    assert after["explored_cells"] > before["explored_cells"]
    assert after["explored_share"] == pytest.approx(after["explored_cells"] / after["reachable_cells"])


def test_a_short_press_jumps(world: RunningWorld) -> None:
    def jumps() -> bool:
        world.send("/input/Jump", 1)
        world.send("/input/Jump", 0)
        return bool(world.state()["position"]["z"] > 10)

    world.wait_until(jumps)
    world.wait_until(lambda: world.state()["position"]["z"] == 0)


def test_a_look_within_the_deadzone_is_held_and_turns_nothing(world: RunningWorld) -> None:
    before = world.state()
    world.send("/input/LookHorizontal", 0.5)
    after = world.wait_until(lambda: (s := world.state())["inputs"]["look_horizontal"] == 0.5 and s)
    world.wait_until(lambda: world.state()["tics"] > after["tics"] + 5)
    assert world.state()["angle_deg"] == before["angle_deg"]


def test_refused_messages_are_counted_and_change_nothing(world: RunningWorld) -> None:
    before = world.state()
    world.send("/input/Vertical", math.nan)
    world.send("/input/Horizontal", math.inf)
    world.send("/input/Horizontal", "right")
    world.send("/input/Nothing", 1.0)
    world.send("/input/Run", [])
    world.wait_until(lambda: world.state()["osc"]["ignored"] == before["osc"]["ignored"] + 5)
    after = world.state()
    assert after["osc"]["received"] == before["osc"]["received"] + 5
    assert after["inputs"] == before["inputs"]
    assert "/input/Run" in after["osc"]["last_error"]


GARBAGE = [
    b"",
    b"\x00",
    b"hello",
    b"/",
    b"/input/Vertical",
    b"/input/Vertical\x00,f\x00\x00",
    b"/input/Vertical\x00,f\x00\x00\x3f",
    b"/input/Vertical\x00,s\x00\x00\xff\xff\xff\xff",
    b"/input/Vertical\x00,q\x00\x00\x00\x00\x00\x00",
    b"/input/Vertical\x00,[[[\x00\x00\x00\x00",
    b"#bundle\x00" + bytes(8) + b"\xff\xff\xff\xff",
    b"#bundle\x00" + bytes(8) + b"\x00\x00\x00\x08#bundle\x00",
    os.urandom(1400),
    bytes(60_000),
]


def test_garbage_is_survived_and_leaves_the_log_alone(world: RunningWorld) -> None:
    before, lines = world.state(), len(world.log)
    for datagram in GARBAGE * 20:
        world.send_bytes(datagram)
    world.wait_until(lambda: world.send("/input/Run", 1) or world.state()["inputs"]["run"])
    after = world.state()
    assert after["osc"]["malformed"] > before["osc"]["malformed"]
    assert {**after["inputs"], "run": False} == before["inputs"]
    assert len(world.log) == lines


def keeps_its_rates(world: RunningWorld, camera: cv2.VideoCapture) -> bool:
    """Whether frames and tics come as fast as they should while 45 frames come."""
    before, start_s = world.state(), time.monotonic()
    assert all(camera.read()[0] for _ in range(45))
    frame_rate, after = 45 / (time.monotonic() - start_s), world.state()
    return (
        frame_rate == pytest.approx(30, rel=0.2)
        and after["tic_rate_hz"] == pytest.approx(35, rel=0.05)
        and after["late_tics"] - before["late_tics"] <= 3
    )


def test_a_client_that_reads_nothing_holds_up_nobody(world: RunningWorld) -> None:
    with socket.create_connection(("127.0.0.1", world.http_port)) as sleeper:
        sleeper.sendall(b"GET /video.mjpg HTTP/1.0\r\n\r\n")
        world.wait_until(lambda: world.state()["clients"] == 1)
        camera = cv2.VideoCapture(world.url + "/video.mjpg")
        camera.read()
        world.wait_until(lambda: keeps_its_rates(world, camera), timeout_s=180)
        camera.release()


def test_clients_are_counted_while_they_watch(world: RunningWorld) -> None:
    world.wait_until(lambda: world.state()["clients"] == 0)
    camera = cv2.VideoCapture(world.url + "/video.mjpg")
    world.wait_until(lambda: camera.read()[0] and world.state()["clients"] == 1)
    camera.release()
    world.wait_until(lambda: world.state()["clients"] == 0)
    assert world.state()["frames_served"] > 0


def test_snapshot_and_page_are_served_and_nothing_else(world: RunningWorld) -> None:
    assert world.get("/snapshot.jpg")[:2] == b"\xff\xd8"
    page = world.get("/").decode()
    assert "/video.mjpg" in page
    assert "http://" not in page
    assert "https://" not in page
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        world.get("/etc/passwd")
    refused.value.close()


def test_more_watchers_than_allowed_are_turned_away(start_world: StartWorld) -> None:
    world = start_world("world.client_limit=1").wait_until_ready()
    camera = cv2.VideoCapture(world.url + "/video.mjpg")
    world.wait_until(lambda: world.state()["clients"] == 1)
    with pytest.raises(urllib.error.HTTPError, match="503") as refused:
        world.get("/video.mjpg")
    refused.value.close()
    camera.release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_leaves_nothing(start_world: StartWorld, number: int) -> None:
    world = start_world().wait_until_ready()
    camera = cv2.VideoCapture(world.url + "/video.mjpg")
    camera.read()
    assert len(world.engines()) == 1
    assert world.signal_and_wait(number) == 0
    camera.release()
    assert world.engines() == []
    assert list((world.folder / "tmp").iterdir()) == []
    assert list((world.folder / "cwd").iterdir()) == []
    assert len(world.log) == 1


def test_a_killed_world_takes_its_engine_along(start_world: StartWorld) -> None:
    world = start_world().wait_until_ready()
    command = Path(f"/proc/{world.engines()[0]}/cmdline").read_text().split("\0")
    instance = command[command.index("+viz_instance_id") + 1]
    world.signal_and_wait(signal.SIGKILL)
    world.wait_until(lambda: not world.engines())
    for left in Path("/dev/shm").glob(f"ViZDoom*{instance}"):  # nobody is left to remove it
        left.unlink()


def test_a_dead_engine_ends_the_world_with_one_line(start_world: StartWorld) -> None:
    world = start_world().wait_until_ready()
    os.kill(world.engines()[0], signal.SIGKILL)
    assert world.exit_code() == 1
    assert "start this service again" in world.log[-1]
    assert len(world.log) == 2


def test_an_engine_that_hangs_ends_the_world_with_one_line(start_world: StartWorld) -> None:
    world = start_world(program="from ami_world import main; main.HANG_S = 3.0; main.main()").wait_until_ready()
    os.kill(world.engines()[0], signal.SIGSTOP)
    assert world.exit_code() == 1
    assert "has not answered for 3 s: start this service again" in world.log[-1]
    world.wait_until(lambda: not world.engines())


def test_the_end_of_its_supervisor_ends_it(start_world: StartWorld) -> None:
    world = start_world(supervised=True).wait_until_ready()
    assert world.process.stdin
    world.process.stdin.close()
    assert world.exit_code() == 0
    assert world.engines() == []


TAKEN = [(socket.SOCK_STREAM, "http_port"), (socket.SOCK_DGRAM, "osc_port")]


@pytest.mark.parametrize(("kind", "key"), TAKEN)
def test_a_taken_port_is_named_in_one_line(start_world: StartWorld, kind: int, key: str) -> None:
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            other.listen()
        port = other.getsockname()[1]
        world = start_world(f"world.{key}={port}")
        assert world.exit_code() == 2
    assert len(world.log) == 1
    assert f"127.0.0.1:{port}" in world.log[0]
    assert f"world.{key}" in world.log[0]


def test_a_missing_scenario_is_named_in_one_line(start_world: StartWorld) -> None:
    world = start_world("world.scenario=nowhere")
    assert world.exit_code() == 2
    assert len(world.log) == 1
    assert "'nowhere'" in world.log[0]
    assert "my_way_home" in world.log[0]
