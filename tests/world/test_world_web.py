"""The camera without a game behind it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np

from ami_world.frames import Frames
from ami_world.web import Camera


def test_watchers_that_leave_while_no_picture_comes_make_room(poll_for: Callable[..., Any]) -> None:
    frames = Frames(quality=85)
    frames.publish(np.zeros((12, 16, 3), np.uint8))
    with closing(Camera(("127.0.0.1", 0), 2, frames, dict)) as camera:
        camera.start()

        def watch() -> socket.socket:
            client = socket.create_connection(("127.0.0.1", camera.server_port))
            client.sendall(b"GET /video.mjpg HTTP/1.0\r\n\r\n")
            return client

        for client in [watch() for _ in range(2)]:
            with client:
                assert client.recv(12) == b"HTTP/1.0 200"
                poll_for(lambda: camera.status.clients > 0)
        poll_for(lambda: camera.status.clients == 0)
        with watch() as late:
            assert late.recv(12) == b"HTTP/1.0 200"
