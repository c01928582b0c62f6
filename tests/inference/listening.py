"""A UDP socket where VRChat would be."""

from __future__ import annotations

import socket
import time

from pythonosc.osc_message import OscMessage

from ami_inference.actuators.controls import NEUTRAL

Values = dict[str, float | int]


class Listener:
    """Hears what is sent to the avatar."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]

    def hear(self, timeout_s: float = 30.0) -> Values | None:
        """Return the next five messages as one map of values; None where none come."""
        values: Values = {}
        deadline = time.monotonic() + timeout_s
        while len(values) < len(NEUTRAL):
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                message = OscMessage(self._socket.recv(4096))
            except TimeoutError:
                assert not values, f"only {values} came"
                return None
            assert message.address not in values, f"{message.address} came twice"
            (values[message.address],) = message.params
        return values

    def close(self) -> None:
        self._socket.close()
