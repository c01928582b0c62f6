"""What happens on a listening socket's connections: a monitor that counts, since a failed handshake raises nothing."""

from __future__ import annotations

import zmq
from zmq.utils.monitor import parse_monitor_message

COUNTED = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "links_made",
    zmq.EVENT_DISCONNECTED: "links_lost",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshakes_failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "handshakes_failed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "handshakes_failed",
}


class LinkWatch:
    """Counts connections made, lost and failed. Used by the thread that owns the socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], watched: zmq.Socket[bytes]) -> None:
        self._watched = watched
        self._monitor = watched.get_monitor_socket(sum(COUNTED))
        self.counts = dict.fromkeys(COUNTED.values(), 0)

    def drain(self) -> None:
        """Take in all events so far."""
        while self._monitor.poll(0):
            event = zmq.Event(parse_monitor_message(self._monitor.recv_multipart())["event"])
            if event in COUNTED:
                self.counts[COUNTED[event]] += 1

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
