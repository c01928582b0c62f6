"""A monitor of a socket's connections: a lost link or a failed handshake raises no exception."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

COUNTED = {
    zmq.EVENT_ACCEPTED: "accepted",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "made",
    zmq.EVENT_DISCONNECTED: "disconnected",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "not admitted",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "mismatched",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "broken off",
}
FAILED = ("not admitted", "mismatched", "broken off")
BROKEN_OFF_OFTEN = 3


class LinkWatch:
    """Counts connections accepted, made (the handshake succeeded) and lost.

    Given to make_socket(), so that it sees the first connection too; drained by any thread, and closed before the
    socket is.

    Attributes:
        up: whether a connecting socket has its connection.
    """

    def __init__(self) -> None:
        self._monitor: zmq.Socket[bytes] | None = None
        self._watched: zmq.Socket[bytes] | None = None
        self.counts: Counter[str] = Counter()
        self.up = False
        self._changed_at = time.monotonic()
        self._attached = self._failed = 0
        self._lock = threading.Lock()

    def attach(self, watched: zmq.Socket[bytes]) -> None:
        """Start watching a socket that has no connection yet."""
        self._attached += 1
        endpoint = f"inproc://links-{id(self)}-{self._attached}"
        watched.monitor(endpoint, sum(COUNTED))
        self._watched = watched
        self._monitor = watched.context.socket(zmq.PAIR)
        self._monitor.set_hwm(0)  # libzmq's own thread would wait for room
        self._monitor.connect(endpoint)

    def drain(self) -> None:
        """Take in all events so far."""
        with self._lock:
            while self._monitor and not self._monitor.closed and self._monitor.poll(0):
                event = zmq.Event(parse_monitor_message(self._monitor.recv_multipart())["event"])
                self._count(COUNTED[event])
                self._changed_at = time.monotonic()

    def _count(self, what: str) -> None:
        """Count one event. A failed handshake ends in a disconnection too, but that is not a lost connection."""
        if what == "disconnected":
            self.up = False
            if self._failed:
                self._failed -= 1
            elif self.counts["made"] > self.counts["lost"]:
                self.counts["lost"] += 1
            return
        self.counts[what] += 1
        self._failed += what in FAILED
        if what == "made":
            self.up = True

    @property
    def refusal(self) -> str | None:
        """Why the other side refuses this socket, if it does; libzmq does not retry then."""
        if self.counts["not admitted"]:
            return "the hub does not know this key: see `ami keys list` there, and `ami keys add`"
        if self.counts["mismatched"]:
            return "one side has keys and the other has none: give --join FILE if the hub has keys, and only then"
        return None

    @property
    def doubt(self) -> str:
        """What may be wrong if the other side breaks off every handshake; otherwise empty."""
        if self.counts["made"] or self.counts["broken off"] < BROKEN_OFF_OFTEN:
            return ""
        return (
            "; something answers there, but breaks off: "
            "give --join FILE if the hub has keys, and only then; FILE must be that hub's"
        )

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the one link of a socket that dials."""
        self.drain()
        since_s = time.monotonic() - self._changed_at
        return {"state": "up" if self.up else "down", "since_s": since_s, "lost": self.counts["lost"]}

    def close(self) -> None:
        """Stop watching: otherwise libzmq's own thread would wait forever for someone to read its events."""
        with self._lock:
            if self._watched and not self._watched.closed:
                self._watched.disable_monitor()
            if self._monitor:
                self._monitor.close(linger=0)


def port_statistics(watches: Mapping[str, LinkWatch]) -> dict[str, dict[str, int]]:
    """Return the events of several ports. Connections accepted without a handshake are strangers'."""
    counts = {port: watch.counts for port, watch in watches.items()}
    return {
        port: {"made": of["made"], "lost": of["lost"], "failed": max(0, of["accepted"] - of["made"])}
        for port, of in counts.items()
    }
