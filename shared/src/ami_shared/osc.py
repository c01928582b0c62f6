"""The target of OSC messages. It never answers, so that only its configured host and port can be checked."""

from __future__ import annotations

import socket
import time

from ami_shared.errors import ConfigurationError

KEY = "inference.environment.actuator"
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
Address = tuple[str, int]


def check_target(host: object, port: object) -> None:
    """Raise ConfigurationError if host or port is not one that OSC can be sent to."""
    if not isinstance(host, str) or not host:
        raise ConfigurationError(f"{KEY}.host={host!r} must be a host's name or address")
    if type(port) is not int or not 0 < port < 1 << 16:
        raise ConfigurationError(f"{KEY}.port={port!r} must be a whole number, 1 to 65535")


def addresses_of(host: str, port: int) -> list[tuple[int, Address]]:
    """Look a host up once; return families and addresses, IPv4 first, since VRChat listens there.

    The unspecified address (0.0.0.0, ::) is replaced by loopback, since not every system can send to it.

    Raises:
        ConfigurationError: the name is unknown.
    """
    try:
        found = socket.getaddrinfo(EVERYWHERE.get(host, host), port, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"OSC host {host!r} cannot be resolved ({error}): set {KEY}.host") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return [(int(family), (str(address[0]), port)) for family, _, _, _, address in found]


def resolve(host: str, port: int, patience_s: float) -> tuple[int, Address]:
    """Look a host up, repeatedly if need be; return the address family and the first address.

    Raises:
        ConfigurationError: the name is still unknown after `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return addresses_of(host, port)[0]
        except ConfigurationError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.25)
