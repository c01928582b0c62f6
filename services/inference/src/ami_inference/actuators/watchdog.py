"""The body's dead man's switch: a tiny process that sends neutral when its parent is gone or silent.

VRChat holds the last value of an axis indefinitely, so the avatar of a body that dies while walking would walk on. This
process outlives the body under any launcher that does not kill both at once: it ignores SIGINT and SIGTERM, and ends
when its standard input does. It needs only the standard library, and is started as a plain file.

    standard input   first line   host port max_silence_s
                     then         length-prefixed datagrams, ended by a length of 0: what to send as neutral
                     then         one byte for each sign of life: b"." acting, b"_" at rest
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, cast

ACTING, RESTING = b".", b"_"
LAST_WORDS = 3


def watch(stream: BinaryIO, send_neutral: Callable[[], None], max_silence_s: float) -> None:
    """Send neutral when an acting parent falls silent, and at the end of the stream; several times: UDP is lossy."""
    signs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        while data := os.read(stream.fileno(), 4096):
            signs.put(data)
        signs.put(b"")

    threading.Thread(target=read, daemon=True).start()
    to_say = 0
    while True:
        try:
            sign = signs.get(timeout=max_silence_s if to_say else None)
        except queue.Empty:
            to_say -= 1
            send_neutral()
            continue
        if not sign:
            for _ in range(LAST_WORDS):
                send_neutral()
                time.sleep(0.05)
            return
        to_say = LAST_WORDS if sign.endswith(ACTING) else 0


def read_settings(stream: BinaryIO) -> tuple[tuple[str, int], float, list[bytes]]:
    """Read the address (host, port), the longest silence in seconds, and the neutral datagrams."""
    host, port, max_silence_s = stream.readline().decode().split()
    datagrams = []
    while size := struct.unpack("<H", stream.read(2))[0]:
        datagrams.append(stream.read(size))
    return (host, int(port)), float(max_silence_s), datagrams


def main() -> None:
    """Watch the parent at the other end of standard input."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    stream = cast(BinaryIO, os.fdopen(sys.stdin.fileno(), "rb", buffering=0))
    try:
        address, max_silence_s, datagrams = read_settings(stream)
    except (ValueError, struct.error):  # the parent has died before it had told all
        return
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sender = socket.socket(family, socket.SOCK_DGRAM)

    def send_neutral() -> None:
        for datagram in datagrams:
            with contextlib.suppress(OSError):
                sender.sendto(datagram, address)

    watch(stream, send_neutral, max_silence_s)


if __name__ == "__main__":
    main()
