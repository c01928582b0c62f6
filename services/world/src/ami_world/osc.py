"""The UDP socket in the place of VRChat's: receives OSC, keeps the held inputs, counts unusable messages.

inputs.py determines what a message means.
"""

from __future__ import annotations

import logging
import socket
import threading
from dataclasses import dataclass, replace

from pythonosc.osc_message import OscMessage
from pythonosc.osc_packet import OscPacket

from ami_shared.errors import ConfigurationError
from ami_world.inputs import HeldInputs, RefusedInput

log = logging.getLogger("ami_world.osc")

LARGEST_DATAGRAM = 65_535
POLL_S = 0.2  # how soon the thread notices that it must end


@dataclass(frozen=True)
class OscCounters:
    """`received` messages, of which `ignored` had no effect; `malformed` datagrams were not OSC."""

    received: int = 0
    ignored: int = 0
    malformed: int = 0
    last_error: str = ""


class OscReceiver:
    """Receives in its own thread from `start` to `close`."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = _bind(host, port)
        self._lock = threading.Lock()
        self._held = HeldInputs()
        self._counters = OscCounters()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="osc", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def counters(self) -> OscCounters:
        return self._counters

    def start(self) -> None:
        logging.getLogger().addFilter(_not_from_python_osc)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(2 * POLL_S)
        logging.getLogger().removeFilter(_not_from_python_osc)
        self._socket.close()

    def take(self) -> HeldInputs:
        """Return the inputs for one tic; a requested jump is returned once."""
        with self._lock:
            held, self._held = self._held, self._held.after_tic()
        return held

    def _receive(self) -> None:
        while not self._closed.is_set():
            try:
                self._handle(self._socket.recv(LARGEST_DATAGRAM))
            except TimeoutError:
                continue
            except OSError as error:
                log.warning("OSC: receiving failed: %s", error)
                self._closed.wait(POLL_S)

    def _handle(self, datagram: bytes) -> None:
        try:
            if len(datagram) % 4:  # the parser would fill a torn value with zeros
                raise ValueError("the length of a packet is a multiple of 4")
            messages = [timed.message for timed in OscPacket(datagram).messages]
        except Exception as error:  # the parser raises far more than its ParseError on garbage
            self._count(malformed=1, error=f"{len(datagram)} bytes are not an OSC packet: {error!r}")
            return
        for message in messages:
            self._apply(message)

    def _apply(self, message: OscMessage) -> None:
        values = message.params
        try:
            if not values:
                raise RefusedInput(f"{message.address[:80]!r} came without a value")
            with self._lock:
                self._held = self._held.receive(message.address, values[0])
        except RefusedInput as error:
            self._count(received=1, ignored=1, error=str(error))
        else:
            self._count(received=1)

    def _count(self, received: int = 0, ignored: int = 0, malformed: int = 0, error: str = "") -> None:
        now = self._counters
        self._counters = replace(
            now,
            received=now.received + received,
            ignored=now.ignored + ignored,
            malformed=now.malformed + malformed,
            last_error=error[:200] or now.last_error,
        )


def _bind(host: str, port: int) -> socket.socket:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        receiver.bind((host, port))
    except OSError as error:
        receiver.close()
        raise ConfigurationError(
            f"OSC cannot listen on UDP {host}:{port} ({error.strerror}): "
            "end the program that uses it, or set world.osc_host and world.osc_port"
        ) from None
    receiver.settimeout(POLL_S)
    return receiver


def _not_from_python_osc(record: logging.LogRecord) -> bool:
    """Drop what python-osc writes to the root logger: a line for each malformed packet would flood the log."""
    return "pythonosc" not in record.pathname
