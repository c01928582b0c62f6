"""Moves a VRChat avatar (or the simulated world's) by OSC over UDP."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pythonosc.osc_message_builder import OscMessageBuilder

from ami_inference.actuators import watchdog
from ami_inference.actuators.controls import CHOICES, NEUTRAL, AxisLag, Values, targets
from ami_inference.actuators.target import Target
from ami_shared.clock import Clock, Every, SystemClock
from ami_shared.config_checks import LONGEST_WAIT_S, is_finite_number
from ami_shared.errors import ConfigurationError
from ami_shared.osc import Address, check_target
from ami_shared.process import own_group
from ami_shared.wire import Array

log = logging.getLogger(__name__)

SAY_EVERY_S = 60.0


def datagram(address: str, value: float | int) -> bytes:
    """Return the OSC message for one address; floats and ints keep their types."""
    builder = OscMessageBuilder(address)
    builder.add_arg(value, "i" if isinstance(value, int) else "f")
    return bytes(builder.build().dgram)


class VRChatOSCDiscreteActuator:
    """Maps five discrete choices to VRChat's input controls (see controls.py).

    VRChat never answers and holds axes indefinitely, so neutral is sent at start, on pause, on stop, on any exception,
    and by the watchdog process when there has been no new action for `max_silence` or this process is gone.

    Attributes:
        max_silence_s: seconds without an action after which all controls have been released.
    """

    choices = CHOICES

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 9000,
        speeds: Sequence[float] = (1.0, 1.0, 1.0),
        lag: float = 0.0,
        max_silence: float = 0.5,
        resolve_patience: float = 3.0,
        clock: Clock | None = None,
    ) -> None:
        """Open the UDP socket, start the watchdog and send neutral.

        Args:
            host: where VRChat (or ami-world) listens for OSC; if a name's address changes, it is followed.
            port: UDP port there.
            speeds: magnitudes of Vertical, Horizontal and LookHorizontal, each in (0, 1]; VRChat ignores
                LookHorizontal up to 0.5 on desktop.
            lag: time constant of the axes in seconds; 0 = none, 0.2 = soft.
            max_silence: seconds without an action after which the watchdog releases all controls.
            resolve_patience: how long to retry the first lookup of the host's name, in seconds.
            clock: measures the time between actions.

        Raises:
            ConfigurationError: a value is out of range, or the host cannot be resolved.
        """
        if len(speeds) != 3 or not all(math.isfinite(v) and 0 < v <= 1 for v in speeds):
            raise ConfigurationError(
                f"inference.environment.actuator.speeds={list(speeds)} must be three numbers above 0 and at most 1"
            )
        if not (is_finite_number(max_silence) and 0 < max_silence <= LONGEST_WAIT_S):
            raise ConfigurationError(
                f"inference.environment.actuator.max_silence={max_silence!r} must be above 0 s and at most a day"
            )
        if not (is_finite_number(lag) and lag >= 0):
            raise ConfigurationError(f"inference.environment.actuator.lag={lag!r} must be 0 seconds or more")
        check_target(host, port)
        self._speeds = (float(speeds[0]), float(speeds[1]), float(speeds[2]))
        self.max_silence_s = max_silence
        self._clock = clock or SystemClock()
        self._lag = AxisLag(lag)
        self._held: Values = dict(NEUTRAL)
        self._acted_at = self._clock.monotonic()
        self._target = Target(host, port, resolve_patience)
        self._address = self._target.address
        self._socket = socket.socket(self._target.family, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._watchdog = start_watchdog(self._address, max_silence)
        self._restart_due = Every(1.0, first_after_s=0.0)
        self._unsent = 0
        self._say_due = Every(SAY_EVERY_S, first_after_s=0.0)
        self.neutral()

    def act(self, action: Array) -> None:
        """Send one action, (5,) int64 (see controls.py); raise ValueError if a choice does not exist."""
        self._held = targets(action, self._speeds)
        now = self._clock.monotonic()
        elapsed_s, self._acted_at = now - self._acted_at, now
        if elapsed_s > self.max_silence_s:  # the watchdog has released all controls
            self._lag.reset()
            elapsed_s = 0.0
        self._send(self._lag.follow(self._held, elapsed_s))
        self._sign_of_life(watchdog.ACTING)

    def neutral(self) -> None:
        self._lag.reset()
        self._acted_at = self._clock.monotonic()
        self._send(NEUTRAL)
        self._sign_of_life(watchdog.RESTING)

    def resume(self) -> None:
        self._acted_at = self._clock.monotonic()
        self._send(self._lag.follow(self._held, 0.0))
        self._sign_of_life(watchdog.ACTING)

    def statistics(self) -> Mapping[str, Any]:
        return {"osc_target": "{}:{}".format(*self._address), "osc_unsent": self._unsent}

    def close(self) -> None:
        self.neutral()
        self._target.close()
        self._socket.close()
        end_watchdog(self._watchdog)

    def _send(self, values: Values) -> None:
        if self._address != self._target.address:
            self._turn_to(self._target.address)
        for address, value in values.items():
            try:
                self._socket.sendto(datagram(address, value), self._address)
            except (BlockingIOError, ConnectionError):
                pass  # temporary, or nobody listens yet
            except OSError as error:
                self._unsent += 1
                if self._say_due.due(self._clock.monotonic()):
                    log.warning("OSC cannot be sent to %s:%d: %s", *self._address, error)

    def _turn_to(self, address: Address) -> None:
        """Follow the host to another address; the old watchdog sends neutral to the previous one, concurrently."""
        self._address = address
        threading.Thread(target=end_watchdog, args=(self._watchdog,), daemon=True).start()
        self._start_watchdog_again()

    def _sign_of_life(self, sign: bytes) -> None:
        assert self._watchdog.stdin is not None
        try:
            self._watchdog.stdin.write(sign)
        except BlockingIOError:
            pass  # a stopped watchdog reads nothing; the loop never waits for it
        except (OSError, ValueError):  # ValueError if it could not be restarted
            if self._restart_due.due(self._clock.monotonic()):
                end_watchdog(self._watchdog)
                log.warning("the watchdog process is gone: it is restarted")
                self._start_watchdog_again()

    def _start_watchdog_again(self) -> None:
        try:
            self._watchdog = start_watchdog(self._address, self.max_silence_s)
        except OSError as error:
            log.error("the watchdog process cannot be restarted: %s", error)  # it is retried later


def start_watchdog(address: tuple[str, int], max_silence_s: float) -> subprocess.Popen[bytes]:
    """Start the process that sends neutral to `address` when this one is gone or silent."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(watchdog.__file__))],
        stdin=subprocess.PIPE,
        bufsize=0,
        **({"start_new_session": True} if hasattr(os, "setsid") else own_group()),
    )
    assert process.stdin is not None
    settings = f"{address[0]} {address[1]} {max_silence_s}\n".encode()
    packets = (datagram(name, value) for name, value in NEUTRAL.items())
    framed = b"".join(struct.pack("<H", len(packet)) + packet for packet in packets)
    process.stdin.write(settings + framed + struct.pack("<H", 0))
    with contextlib.suppress(OSError, AttributeError):  # not possible for pipes on Windows before Python 3.12
        os.set_blocking(process.stdin.fileno(), False)
    return process


def end_watchdog(process: subprocess.Popen[bytes]) -> None:
    """Close the watchdog's input, whereupon it sends neutral and ends."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
