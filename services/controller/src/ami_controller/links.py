"""What happens on a listening socket's connections: a monitor that counts, since a failed handshake raises nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import zmq
from zmq.utils.monitor import parse_monitor_message

COUNTED = {
    zmq.EVENT_ACCEPTED: "accepted",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "made",
    zmq.EVENT_DISCONNECTED: "lost",
}


class LinkWatch:
    """Counts connections accepted, made (the handshake succeeded) and lost."""

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        self._monitor = watched.get_monitor_socket(sum(COUNTED))
        self.counts: Counter[str] = Counter()

    def drain(self) -> None:
        """Take in all events so far."""
        while self._monitor.poll(0):
            event = zmq.Event(parse_monitor_message(self._monitor.recv_multipart())["event"])
            self.counts[COUNTED[event]] += 1

    def close(self) -> None:
        """Stop watching; before the watched socket's context ends."""
        self._monitor.close(linger=0)


def link_statistics(watches: Iterable[LinkWatch]) -> dict[str, int]:
    """Return sums over several ports. What was accepted but never shook hands is a stranger's."""
    total: Counter[str] = sum((watch.counts for watch in watches), Counter())
    return {
        "links_made": total["made"],
        "links_lost": total["lost"],
        "handshakes_failed": max(0, total["accepted"] - total["made"]),
    }
