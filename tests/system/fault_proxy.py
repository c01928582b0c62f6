"""A TCP proxy that misbehaves on command: it freezes (half-open links: nothing passes, nothing ends) or cuts (RST)."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence

CHUNK = 1 << 16


class FaultProxy:
    """Listens on some ports of the loopback interface and passes on to the same number of others."""

    def __init__(self, ports: Sequence[int], targets: Sequence[int]) -> None:
        self._selector = selectors.DefaultSelector()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._listeners = []
        for port, target in zip(ports, targets, strict=True):
            listener = socket.create_server(("127.0.0.1", port))
            self._selector.register(listener, selectors.EVENT_READ, target)
            self._listeners.append(listener)
        self._frozen = threading.Event()
        self._cut_until = 0.0
        self._ending = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def freeze(self) -> None:
        """Let nothing pass any more; connections stay open."""
        self._frozen.set()

    def thaw(self) -> None:
        """Let everything pass again, also what came meanwhile."""
        self._frozen.clear()

    def cut(self, seconds: float) -> None:
        """Reset all connections, and every new one for so long."""
        self._cut_until = time.monotonic() + seconds

    def close(self) -> None:
        self._ending = True
        self._thread.join(5.0)
        for listener in self._listeners:
            listener.close()
        self._reset_all()
        self._selector.close()

    def _run(self) -> None:
        while not self._ending:
            if time.monotonic() < self._cut_until:
                self._reset_all()
            if self._frozen.is_set():
                time.sleep(0.02)
                continue
            for key, _ in self._selector.select(0.05):
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready in self._listeners:
                    self._accept(ready, key.data)
                elif ready in self._pairs:
                    self._pass_on(ready)

    def _accept(self, listener: socket.socket, target: int) -> None:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(("127.0.0.1", target), timeout=5.0)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.setblocking(True)
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        try:
            data = source.recv(CHUNK)
            if data:
                self._pairs[source].sendall(data)
                return
        except OSError:
            pass
        self._drop(source)

    def _drop(self, one: socket.socket, reset: bool = False) -> None:
        for end in (one, self._pairs[one]):
            self._selector.unregister(end)
            self._pairs.pop(end)
            if reset:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()

    def _reset_all(self) -> None:
        while self._pairs:
            self._drop(next(iter(self._pairs)), reset=True)
