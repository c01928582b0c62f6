"""The HTTP side: the camera as an MJPEG stream, the newest picture, the state as JSON, and a page for people.

Each connection has a daemon thread. Nothing here touches the game: it reads the newest frame and calls `state`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from ami_shared.errors import ConfigurationError
from ami_world.frames import Frames
from ami_world.status import CameraStatus

log = logging.getLogger("ami_world.web")

BOUNDARY = "frame"
CLIENT_TIMEOUT_S = 10.0  # a client that takes nothing for this long is dropped
SEND_BUFFER_BYTES = 64 << 10  # a few frames: a slow client sees these with delay


class Camera(ThreadingHTTPServer):
    """The HTTP server; it listens from the start and answers between `start` and `close`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(
        self, address: tuple[str, int], client_limit: int, frames: Frames, state: Callable[[], dict[str, Any]]
    ) -> None:
        try:
            super().__init__(address, _Request)
        except OSError as error:
            raise ConfigurationError(
                f"the camera cannot listen on TCP {address[0]}:{address[1]} ({error.strerror}): "
                "end the program that uses it, or set world.http_host and world.http_port"
            ) from None
        self.frames = frames
        self.state = state
        self.page = files("ami_world").joinpath("page.html").read_bytes()
        self._client_limit = client_limit
        self._lock = threading.Lock()
        self._clients = 0
        self._frames_served = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="http", daemon=True)

    def server_bind(self) -> None:
        """Bind without the base class's lookup of the host's name, which can take seconds."""
        if os.name != "nt":  # on Windows the option would let two programs listen
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def status(self) -> CameraStatus:
        with self._lock:
            return CameraStatus(self._frames_served, self._clients)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.frames.close()
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()

    @contextlib.contextmanager
    def watching(self) -> Any:
        """Count a client while it watches; yield False if there are too many already."""
        with self._lock:
            admitted = self._clients < self._client_limit
            self._clients += admitted
        try:
            yield admitted
        finally:
            with self._lock:
                self._clients -= admitted

    def count_frame(self) -> None:
        with self._lock:
            self._frames_served += 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("HTTP: request of %s failed", client_address, exc_info=True)


class _Request(BaseHTTPRequestHandler):
    server: Camera
    timeout = CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        routes = {
            "/": self._page,
            "/video.mjpg": self._video,
            "/snapshot.jpg": self._snapshot,
            "/state": self._state,
        }
        answer = routes.get(urlsplit(self.path).path)
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND, f"Not found. There are {' '.join(routes)}")
            return
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client left
            answer()

    def _page(self) -> None:
        self._send("text/html; charset=utf-8", self.server.page)

    def _state(self) -> None:
        self._send("application/json", json.dumps(self.server.state()).encode())

    def _snapshot(self) -> None:
        jpeg = self.server.frames.newest()
        if jpeg is None:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "There is no picture yet")
        else:
            self._send("image/jpeg", jpeg.data)

    def _video(self) -> None:
        with self.server.watching() as admitted:
            if not admitted:
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "Too many viewers. Raise world.client_limit")
                return
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._send_head(f"multipart/x-mixed-replace; boundary={BOUNDARY}")
            self._stream()

    def _stream(self) -> None:
        shown = 0
        while not self.server.frames.closed:
            jpeg = self.server.frames.newest(after=shown)
            if jpeg is None:
                if self._has_left():
                    return
                continue
            head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg.data)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg.data + b"\r\n")
            self.server.count_frame()
            shown = jpeg.number

    def _has_left(self) -> bool:
        """Return whether the client has closed the connection, which is not noticed while nothing is written."""
        readable, _, _ = select.select([self.connection], [], [], 0.0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send(self, kind: str, body: bytes) -> None:
        self._send_head(kind, length=len(body))
        self.wfile.write(body)

    def _send_head(self, kind: str, length: int | None = None) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("HTTP: " + format, *args)
