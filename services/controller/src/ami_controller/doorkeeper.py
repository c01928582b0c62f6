"""The doorkeeper: tells ZeroMQ whether the owner of a key may connect (ZAP, RFC 27), and watches the list of keys.

libzmq asks on a dedicated socket before a connection is made. Without an answer no connection is admitted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

import zmq
from zmq.utils import z85

from ami_controller.allowance import Allowance
from ami_controller.authority import CONTROLLER, Authority
from ami_controller.key_folder import KeyFolder, Listing, Peer
from ami_shared import limits
from ami_shared.bus import Port
from ami_shared.clock import Every
from ami_shared.keys import Credentials, Door, Pair

log = logging.getLogger(__name__)

ENDPOINT = "inproc://zeromq.zap.01"
POLL_MS = 200
LOOK_EVERY_S = 0.5
MOST_REMEMBERED = 1_000
LINES_PER_S, LINES_AT_ONCE = 0.2, 100  # to the log, of which a stranger may have a new key for each connection


class Refusals:
    """Counts what was refused, and logs each kind once, with its peer; of very many kinds, some."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._said: set[str] = set()
        self._clock, self._lines = clock, Allowance(LINES_PER_S, LINES_AT_ONCE)
        self.count: Counter[str] = Counter()

    def add(self, what: str, why: str, peer: str) -> None:
        """Count one refusal.

        Args:
            what: what was refused, e.g. "connections".
            why: the reason.
            peer: who was refused.
        """
        self.count[what] += 1
        line = f"{peer}: {why}"
        if line not in self._said and self._lines.take("log", self._clock()):
            if len(self._said) >= MOST_REMEMBERED:
                self._said.clear()
            self._said.add(line)
            log.warning("refused: %s (logged once; %d %s refused so far)", line, self.count[what], what)


class Security:
    """The hub's keys, and who may use them."""

    def __init__(self, folder: KeyFolder, authority: Authority, own: Pair) -> None:
        """Load the hub's key pair from the folder.

        Args:
            folder: the folder of keys.
            authority: decides who may do what.
            own: the pair with which the controller connects to its own hub.
        """
        self.folder, self.authority, self.refusals = folder, authority, Refusals()
        self._pair, self._own = folder.pair(), own
        self.trouble: str | None = None

    def door(self, port: Port) -> Door:
        """Return the keys for the hub's listening socket at a port."""
        return Door(self._pair, port.name)

    @property
    def credentials(self) -> Credentials:
        """Return the credentials of the controller itself."""
        return Credentials(self._pair.public, self._own)

    @property
    def itself(self) -> Peer:
        """Return the controller as a peer of its own hub."""
        return Peer(CONTROLLER, CONTROLLER, self._own.public)

    def look_again(self) -> list[Peer]:
        """Read the list of keys again; return the peers who may no longer connect."""
        return self.take(self.folder.allowed())

    def take(self, listing: Listing) -> list[Peer]:
        """Take over a list of keys; return the peers who may no longer connect.

        A file that is no entry changes nothing for the service of its name, so that a mistake locks nobody out.
        """
        stay = [peer for peer in self.authority.peers if peer.name in listing.odd]
        self.complain("; ".join(listing.odd.values()) or None)
        return self.authority.replace([*listing.peers, *stay, self.itself])

    def complain(self, trouble: str | None) -> None:
        """Note what is wrong with the list, for the log and the status; None = nothing."""
        if trouble and trouble != self.trouble:
            log.error("keys: %s", trouble)
        self.trouble = trouble


class Doorkeeper(threading.Thread):
    """One thread for all sockets of the hub in one context."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        security: Security,
        on_revoked: Callable[[list[Peer]], None] = lambda peers: None,
    ) -> None:
        """Bind the socket that libzmq asks, before any guarded socket is bound.

        Args:
            context: of the guarded sockets.
            security: the hub's keys.
            on_revoked: called in this thread with the peers whose keys are no longer on the list.
        """
        super().__init__(name="doorkeeper", daemon=True)
        self._security, self._on_revoked = security, on_revoked
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ENDPOINT)
        self._ending = threading.Event()
        self._allowance = Allowance(limits.CONNECTION_RATE, limits.CONNECTION_BURST)
        self._look = Every(LOOK_EVERY_S, first_after_s=0.0)
        self._seen: object = None

    def close(self) -> None:
        """End the thread: from now on no connection is admitted."""
        self._ending.set()
        self.join(timeout=limits.CLOSING)

    def run(self) -> None:
        while not self._ending.is_set():
            if self._socket.poll(POLL_MS):
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
            if self._look.due(time.monotonic()):
                self._look_at_list()
        self._socket.close()

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """Return ZAP's answer: version, request, status code, text, user id, metadata."""
        version, request, domain, address, _, mechanism, *credentials = question
        public = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
        why_not = self._why_not(public, domain)
        if not why_not and not self._allowance.take(public, time.monotonic()):
            self._security.refusals.add("connections", "more connections than a key may make", f"key {public.decode()}")
            return [version, request, b"300", b"later", b"", b""]
        if why_not:
            self._security.refusals.add("connections", why_not, f"{address.decode()} with key {public.decode()}")
            return [version, request, b"400", b"not admitted", b"", b""]
        return [version, request, b"200", b"OK", public, b""]

    def _why_not(self, public: bytes, domain: bytes) -> str | None:
        try:
            port = Port[domain.decode()]
        except (KeyError, UnicodeDecodeError):
            return f"domain {domain!r:.40} does not belong to this hub"
        return self._security.authority.why_not_in(public, port)

    def _look_at_list(self) -> None:
        """Follow the list of keys; one that cannot be read stays as it was."""
        try:
            changes = self._security.folder.changes()
            if changes == self._seen:
                return
            listing = self._security.folder.allowed()
            if self._security.folder.changes() != changes:
                return  # it changed while it was read
            revoked = self._security.take(listing)
            self._seen = changes
        except OSError as error:
            where = error.filename or self._security.folder.folder
            self._seen = None
            self._security.complain(f"{where} cannot be read ({error.strerror}): the list of keys stays as it was")
            return
        if revoked:
            log.warning("revoked: %s", ", ".join(f"{peer.role} {peer.name}" for peer in revoked))
            self._on_revoked(revoked)
