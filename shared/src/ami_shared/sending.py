"""Sending large frames from where they are, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import zmq


def send_in_place(
    socket: zmq.Socket[bytes], frames: Sequence[bytes | memoryview], least_bytes: int = 0
) -> list[zmq.MessageTracker]:
    """Send a message; do not copy its frames of `least_bytes` and more.

    Returns:
        A tracker of each frame that is not copied: its memory must not change until the tracker is done.
    """
    trackers, last = [], len(frames) - 1
    for n, frame in enumerate(frames):
        more = zmq.SNDMORE if n < last else 0
        if len(frame) < least_bytes:
            socket.send(frame, more)
        elif tracker := socket.send(frame, more, copy=False, track=True):
            trackers.append(tracker)
    return trackers
