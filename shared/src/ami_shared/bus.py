"""Sockets: the hub's address and ports, and the one function that makes every socket.

Options set after bind or connect are silently ignored by ZeroMQ, so all of them are set here, first.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import re
import socket
from dataclasses import dataclass, field, replace
from enum import Enum

import zmq

from ami_shared import limits
from ami_shared.errors import AmiError, ConfigurationError
from ami_shared.keys import Credentials, Door
from ami_shared.links import LinkWatch


class Port(Enum):
    """The hub's ports, as offsets from its base port."""

    CONTROL = 0
    EXPERIENCE_IN = 1
    EXPERIENCE_OUT = 2
    PARAMETERS_IN = 3
    PARAMETERS_OUT = 4


@dataclass(frozen=True)
class HubAddress:
    """The hub's address and the credentials to connect with. Its five ports are consecutive, starting at `port`.

    Attributes:
        credentials: keys to connect with; None if the hub accepts connections without keys.
    """

    host: str
    port: int
    credentials: Credentials | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Parse `host:port` (an IPv6 host in brackets); raise ConfigurationError if it is malformed."""
        address, _, port = text.rpartition(":")
        host = address.strip("[]")
        last_port = 65_535 - len(Port) + 1
        if not _is_host(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) <= last_port:
            raise ConfigurationError(f"hub={text!r} is not host:port with a port from 1 to {last_port}")
        return cls(host, int(port))

    def endpoint(self, port: Port) -> str:
        """Return the ZeroMQ endpoint of one of the hub's ports."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port + port.value}"

    def at(self, host: str) -> HubAddress:
        """Return the same ports at another host."""
        return replace(self, host=host)

    def with_credentials(self, credentials: Credentials | None) -> HubAddress:
        """Return the same hub with these credentials."""
        return replace(self, credentials=credentials)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _is_host(host: str) -> bool:
    """Return whether a text could be a host name or an address."""
    if ":" not in host:
        return re.fullmatch(r"[^\s/]+", host) is not None
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether an address to bind is reachable from this machine only. Names other than localhost are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class SocketOptions:
    """The options that differ between sockets; all others are the same everywhere.

    Attributes:
        queue: high-water mark in messages; SUB and XSUB queues are longer, see limits.
        max_frame_bytes: a peer that sends a larger frame is disconnected.
        routing_id: the name under which a ROUTER knows this socket.
        subscriptions: topic prefixes (SUB only).
        send_buffer_bytes: of the operating system, for each connection; -1 = it decides.
    """

    queue: int = limits.CONTROL_QUEUE
    max_frame_bytes: int = limits.MAX_CONTROL_FRAME_BYTES
    routing_id: bytes = b""
    subscriptions: tuple[bytes, ...] = ()
    send_buffer_bytes: int = -1


EXPERIENCE = SocketOptions(
    limits.EXPERIENCE_QUEUE, limits.MAX_EXPERIENCE_FRAME_BYTES, send_buffer_bytes=limits.SEND_BUFFER_BYTES
)
PARAMETERS = SocketOptions(
    limits.PARAMETER_QUEUE, limits.MAX_SNAPSHOT_FRAME_BYTES, send_buffer_bytes=limits.SEND_BUFFER_BYTES
)


def make_socket(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    *,
    bind: str | None = None,
    connect: str | None = None,
    options: SocketOptions = SocketOptions(),
    watch: LinkWatch | None = None,
    security: Credentials | Door | None = None,
) -> zmq.Socket[bytes]:
    """Make a socket, set all its options, then bind or connect it.

    Args:
        watch: receives the events of all its connections.
        security: keys of a connecting or of a listening socket; None = neither encrypted nor authenticated.

    Raises:
        ConfigurationError: the address is taken, or is not an address.
    """
    made = context.socket(kind)
    made.linger = 0
    _set_queues(made, kind, options.queue)
    made.setsockopt(zmq.MAXMSGSIZE, options.max_frame_bytes)
    made.setsockopt(zmq.SNDBUF, options.send_buffer_bytes)
    made.setsockopt(zmq.HEARTBEAT_IVL, int(limits.LINK_HEARTBEAT * 1000))
    made.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(limits.LINK_TIMEOUT * 1000))
    made.setsockopt(zmq.HEARTBEAT_TTL, int(limits.LINK_TIMEOUT * 1000))
    made.setsockopt(zmq.RECONNECT_IVL, int(limits.RECONNECT_FIRST * 1000))
    made.setsockopt(zmq.RECONNECT_IVL_MAX, int(limits.RECONNECT_LONGEST * 1000))
    made.setsockopt(zmq.HANDSHAKE_IVL, int(limits.HANDSHAKE_TIMEOUT * 1000))
    made.setsockopt(zmq.IPV6, speaks_ipv6(host_of(connect or bind or "")))
    if options.routing_id:
        made.setsockopt(zmq.ROUTING_ID, options.routing_id)
    if kind == zmq.ROUTER:
        made.setsockopt(zmq.ROUTER_MANDATORY, 1)
        made.setsockopt(zmq.ROUTER_HANDOVER, 1)
    for prefix in options.subscriptions:
        made.setsockopt(zmq.SUBSCRIBE, prefix)
    if security:
        security.protect(made)
    if watch:
        watch.attach(made)
    try:
        if bind is not None:
            made.bind(bind)
        if connect is not None:
            made.connect(connect)
    except zmq.ZMQError as error:
        if watch:
            watch.close()
        made.close()
        raise _address_error(bind or connect or "", error) from None
    return made


def dial(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    hub: HubAddress,
    port: Port,
    options: SocketOptions = SocketOptions(),
    watch: LinkWatch | None = None,
) -> zmq.Socket[bytes]:
    """Make a socket that is connected to one of the hub's ports, with the credentials for it; as make_socket()."""
    return make_socket(
        context, kind, connect=hub.endpoint(port), options=options, watch=watch, security=hub.credentials
    )


def host_of(endpoint: str) -> str:
    """Return the host that an endpoint such as tcp://[::1]:5550 names."""
    return endpoint.rpartition("//")[2].rpartition(":")[0].strip("[]")


@functools.cache
def speaks_ipv6(host: str) -> bool:
    """Return whether to reach a host by IPv6: libzmq tries one address of a name, and most hubs have an IPv4 one."""
    if ":" in host or host == "*":
        return True
    try:
        return not socket.getaddrinfo(host, None, socket.AF_INET)
    except (OSError, UnicodeError):
        pass
    try:
        return bool(socket.getaddrinfo(host, None, socket.AF_INET6))
    except (OSError, UnicodeError):
        return False  # cannot be resolved at present


def _set_queues(made: zmq.Socket[bytes], kind: int, queue: int) -> None:
    """Bound the queues. Subscriptions travel as messages too: a short queue would silently lose some of them.

    `queue` bounds what is to be sent; the sending end drops the excess. A receiver whose queue is full would stop
    reading, heartbeats included; and if its link fails in that state, libzmq 4.3.5 aborts the process at the next
    heartbeat received or due, or when the link returns (libzmq issue 3937). A receiver that was suspended gets
    everything that has arrived since at once.
    """
    sending, receiving = queue, limits.RECEIVING_QUEUE
    if kind in (zmq.SUB, zmq.XSUB):
        sending = limits.SUBSCRIPTION_QUEUE
    made.setsockopt(zmq.SNDHWM, sending)
    made.setsockopt(zmq.RCVHWM, receiving)


def _address_error(endpoint: str, error: zmq.ZMQError) -> AmiError:
    if error.errno == zmq.EADDRINUSE:
        return ConfigurationError(
            f"{endpoint} is taken by another process: end it, or choose another base port with hub=host:port"
        )
    return ConfigurationError(f"{endpoint} cannot be used ({error}): check hub= and controller.bind=")


class Waker:
    """Wakes a thread that polls sockets: register `fileno()` with the poller, call `wake()` from any thread."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        if self._sender.family != getattr(socket, "AF_UNIX", None):  # on Windows it is TCP, which else waits for more
            self._sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def wake(self) -> None:
        """Make the next or running poll return at once."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._sender.send(b"!")

    def clear(self) -> None:
        """Forget all wake-ups so far."""
        with contextlib.suppress(BlockingIOError, OSError):
            while self._receiver.recv(4096):
                pass

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
