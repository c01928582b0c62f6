"""Where OSC goes: nobody ever answers there, so what can be known of it is known from the words alone."""

from __future__ import annotations

import socket
import time

from ami_shared.errors import ConfigurationError

KEY = "inference.environment.actuator"


def check_target(host: object, port: object) -> None:
    """Raise ConfigurationError where host and port are none that OSC can be sent to."""
    if not isinstance(host, str) or not host:
        raise ConfigurationError(f"{KEY}.host={host!r} must be a host's name or address")
    if type(port) is not int or not 0 < port < 1 << 16:
        raise ConfigurationError(f"{KEY}.port={port!r} must be a whole number, 1 to 65535")


def resolve(host: str, port: int, patience_s: float) -> tuple[int, tuple[str, int]]:
    """Look a host up; return the address family and the address: IPv4 if it has one, since there VRChat listens.

    Raises:
        ConfigurationError: the name stays unknown for `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
            return family, (str(address[0]), port)
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise ConfigurationError(f"OSC host {host!r} cannot be resolved ({error}): set {KEY}.host") from None
            time.sleep(0.25)
