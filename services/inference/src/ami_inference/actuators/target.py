"""The target of OSC messages: the address of a host, which may change while a body runs."""

from __future__ import annotations

import ipaddress
import logging
import threading

from ami_shared.errors import ConfigurationError
from ami_shared.osc import Address, addresses_of, resolve

log = logging.getLogger(__name__)

LOOK_UP_EVERY_S = 30.0


class Target:
    """A host's address. A host name is looked up repeatedly, in a thread beside the loop that acts.

    Attributes:
        family: address family, which does not change.
        address: the present address.
    """

    def __init__(self, host: str, port: int, patience_s: float) -> None:
        """Resolve the host, and follow its name from then on.

        Args:
            host: name or address.
            port: UDP port.
            patience_s: how long to retry the first lookup of a name, in seconds.

        Raises:
            ConfigurationError: the name is still unknown then.
        """
        self._host, self._port = host, port
        self.family, self.address = resolve(host, port, patience_s)
        self._ending = threading.Event()
        if not _is_address(host):
            threading.Thread(target=self._follow, name="osc target", daemon=True).start()

    def close(self) -> None:
        """Stop looking the name up."""
        self._ending.set()

    def _follow(self) -> None:
        while not self._ending.wait(LOOK_UP_EVERY_S):
            self._look_up()

    def _look_up(self) -> None:
        """Change the address if the present one is no longer the host's; keep it if the name cannot be resolved."""
        try:
            found: list[Address] = [
                address for family, address in addresses_of(self._host, self._port) if family == self.family
            ]
        except ConfigurationError:
            return
        if found and self.address not in found:
            log.warning(
                "%s is at %s now, and no longer at %s: OSC goes there", self._host, found[0][0], self.address[0]
            )
            self.address = found[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
