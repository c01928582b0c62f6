"""Receiving: decode all messages that a socket has and pass them on; malformed ones are counted, logged and dropped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import zmq

from ami_shared import wire
from ami_shared.clock import Every
from ami_shared.errors import WireError
from ami_shared.wire import Message

SAY_EVERY_S = 10.0


class Malformed:
    """Counts the messages dropped at one place, and logs that at a bounded rate. Thread-safe."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        """Start at zero.

        Args:
            log: the receiver's log.
            what: the kind of message, e.g. "snapshot".
        """
        self._log, self._what = log, what
        self._due = Every(SAY_EVERY_S, first_after_s=0.0)
        self._lock = threading.Lock()
        self.count = 0

    def dropped(self, error: WireError, peer: str = "") -> None:
        """Count one dropped message."""
        with self._lock:
            self.count += 1
            count, due = self.count, self._due.due(time.monotonic())
        if due:
            sender = f" from {peer:.80}" if peer else ""
            self._log.warning("malformed %s dropped (%d so far)%s: %s", self._what, count, sender, error)


def waiting(socket: zmq.Socket[bytes], at_most: int) -> Iterator[list[zmq.Frame]]:
    """Yield the messages that have arrived, as their frames, without waiting for more."""
    for _ in range(at_most):
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        yield frames


def receive_all(
    socket: zmq.Socket[bytes],
    take: Callable[[Message], None],
    malformed: Malformed,
    at_most: int = 1_000,
    on_undecodable: Callable[[bytes], None] = lambda topic: None,
) -> None:
    """Pass on the messages that have arrived, without waiting for more.

    Args:
        socket: to receive from.
        take: called with each message; may raise WireError.
        malformed: counts what is dropped.
        at_most: number of messages.
        on_undecodable: called with the topic of what cannot be decoded at all.
    """
    for frames in waiting(socket, at_most):
        try:
            message = wire.decode([frame.buffer for frame in frames])
        except WireError as error:
            malformed.dropped(error)
            on_undecodable(frames[0].bytes)
            continue
        try:
            take(message)
        except WireError as error:
            malformed.dropped(error)
