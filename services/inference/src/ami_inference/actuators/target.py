"""Where OSC goes: the address of a host that may get another one while a body lives."""

from __future__ import annotations

import ipaddress
import logging
import threading

from ami_shared.errors import ConfigurationError
from ami_shared.osc import Address, addresses_of, resolve

log = logging.getLogger(__name__)

LOOK_UP_EVERY_S = 30.0


class Target:
    """A host's address. Where the host is a name it is looked up again and again, beside the loop that acts.

    Attributes:
        family: of the address, which stays.
        address: of the present.
    """

    def __init__(self, host: str, port: int, patience_s: float) -> None:
        """Resolve the host, and follow its name from then on.

        Args:
            patience_s: seconds to go on looking a name up at first.

        Raises:
            ConfigurationError: it stays unknown.
        """
        self._host, self._port = host, port
        self.family, self.address = resolve(host, port, patience_s)
        self._ending = threading.Event()
        if not _is_address(host):
            threading.Thread(target=self._follow, name="osc target", daemon=True).start()

    def close(self) -> None:
        """Look nothing up any more."""
        self._ending.set()

    def _follow(self) -> None:
        while not self._ending.wait(LOOK_UP_EVERY_S):
            self._look_up()

    def _look_up(self) -> None:
        """Take another address where the present one is not the host's any more; an unknown name keeps its own."""
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
