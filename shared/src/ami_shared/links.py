"""What happens on a socket's connections: a monitor tells, since a lost link or a failed handshake raises nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

COUNTED = {
    zmq.EVENT_ACCEPTED: "accepted",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "made",
    zmq.EVENT_DISCONNECTED: "lost",
}


class LinkWatch:
    """Counts connections accepted, made (the handshake succeeded) and lost.

    Given to make_socket(), which lets it see the first connection too; drained and closed by one thread.
    """

    def __init__(self) -> None:
        self._monitor: zmq.Socket[bytes] | None = None
        self.counts: Counter[str] = Counter()
        self._changed_at = time.monotonic()

    def attach(self, watched: zmq.Socket[bytes]) -> None:
        """Begin to watch a socket that has no connection yet."""
        endpoint = f"inproc://links-{id(self)}"
        watched.monitor(endpoint, sum(COUNTED))
        self._monitor = watched.context.socket(zmq.PAIR)
        self._monitor.set_hwm(0)  # libzmq's own thread would wait for room
        self._monitor.connect(endpoint)

    def drain(self) -> None:
        """Take in all events so far."""
        while self._monitor and not self._monitor.closed and self._monitor.poll(0):
            event = zmq.Event(parse_monitor_message(self._monitor.recv_multipart())["event"])
            self.counts[COUNTED[event]] += 1
            self._changed_at = time.monotonic()

    @property
    def up(self) -> bool:
        """Whether a socket that dials has its connection."""
        return self.counts["made"] > self.counts["lost"]

    def statistics(self) -> dict[str, Any]:
        """Return what `ami status` shows of the one link of a socket that dials."""
        self.drain()
        since_s = time.monotonic() - self._changed_at
        return {"state": "up" if self.up else "down", "since_s": since_s, "lost": self.counts["lost"]}

    def close(self) -> None:
        """Stop watching; before the watched socket's context ends."""
        if self._monitor:
            self._monitor.close(linger=0)


def link_statistics(watches: Iterable[LinkWatch]) -> dict[str, int]:
    """Return sums over several ports. What was accepted but never shook hands is a stranger's."""
    total: Counter[str] = sum((watch.counts for watch in watches), Counter())
    return {
        "links_made": total["made"],
        "links_lost": total["lost"],
        "handshakes_failed": max(0, total["accepted"] - total["made"]),
    }
