"""A body in plain Python with only pyzmq and msgpack: what docs/protocol.md says is enough to take part.

It moves a bright square at random over a dark floor, ten times a second or as configured, and leaves a record of each
step for the trainers. It pauses and resumes with the whole system, retains sent records for trainers that missed some,
and rejoins a restarted controller.

    ami-controller experiment=noise                         # each in its own terminal
    ami-trainer experiment=noise trainer=image_vae
    python examples/plain_body.py --hub 127.0.0.1:5550
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import secrets
import socket
import struct
import sys
import time
from collections import deque

import msgpack
import zmq

PROTOCOL_VERSION = 2
CONTROL, EXPERIENCE_IN = 0, 1  # offsets from the hub's base port
HEARTBEAT_S = 0.5
EXTENT_S = 0.5
STALL_S = 1.0  # what comes after so long a pause of this process does not continue what was before
RETAINED_BYTES = 64_000_000
BATCHES_AN_ANSWER, BYTES_AN_ANSWER = 64, 16 << 20
SQUARE = 12


class Refused(Exception):
    """The system does not accept this body."""


class PlainBody:
    """One body: its sockets, its square, and the records it retains."""

    def __init__(self, host: str, port: int, name: str) -> None:
        self.name, self.incarnation = name, secrets.token_hex(8)
        self.state, self.epoch, self.joined, self.lineage = "starting", -1, False, ""
        self.desired = {"paused": False, "stopping": False, "epoch": -1}
        self.clock_ahead_s, self.clock_doubt_s = 0.0, float("inf")  # of the hub's clock, relative to ours
        self.segment, self.segment_open = -1, False
        self.sequence = self.retained_bytes = 0
        self.retained: deque[tuple[int, list[bytes]]] = deque()
        context = zmq.Context.instance()
        self.control = context.socket(zmq.DEALER)
        self.control.setsockopt(zmq.ROUTING_ID, secrets.token_hex(16).encode())
        self.control.setsockopt(zmq.SNDHWM, 100)  # few old heartbeats wait for a hub that is away
        self.experience = context.socket(zmq.PUB)
        for made, offset in ((self.control, CONTROL), (self.experience, EXPERIENCE_IN)):
            made.setsockopt(zmq.HEARTBEAT_IVL, 500)
            made.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5000)
            made.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            made.setsockopt(zmq.LINGER, 500)
            made.connect(f"tcp://{host}:{port + offset}")

    def frames(self, kind: str, fields: dict, topic: bytes = b"", arrays: dict | None = None) -> list[bytes]:
        """Return a message's frames; `arrays` maps names to (dtype, shape, bytes)."""
        arrays = arrays or {}
        header = {"v": PROTOCOL_VERSION, "type": kind, "from": self.name, "inc": self.incarnation, "fields": fields}
        header["arrays"] = [[array, dtype, list(shape)] for array, (dtype, shape, _) in arrays.items()]
        return [topic, msgpack.packb(header), *(raw for _, _, raw in arrays.values())]

    def tell(self, kind: str, fields: dict) -> None:
        """Send the controller a message, or drop it where too many wait: the body never does."""
        with contextlib.suppress(zmq.Again):
            self.control.send_multipart(self.frames(kind, fields), zmq.DONTWAIT)

    def hear(self, timeout_s: float) -> dict | None:
        """Return the header of the controller's next message, or None."""
        if not self.control.poll(max(0, int(timeout_s * 1000))):
            return None
        header: dict = msgpack.unpackb(self.control.recv_multipart()[1])
        if header["v"] != PROTOCOL_VERSION:
            raise Refused(f"the hub speaks protocol version {header['v']}, this body {PROTOCOL_VERSION}")
        return header

    def ask_agreement(self) -> dict:
        """Return what all configurations must agree on; wait for the controller indefinitely."""
        while True:
            self.tell("agreement", {"request": 1})
            deadline = time.monotonic() + 2.0
            while header := self.hear(deadline - time.monotonic()):
                if header["type"] == "result":
                    return header["fields"]["agreement"]
            print("waiting for the controller", flush=True)

    def live(self) -> None:
        """Join, and act until the system shuts down."""
        self.agreement = self.ask_agreement()
        if self.agreement["pace"] != "realtime":
            raise Refused(f"this body lives in real time, the system's pace is {self.agreement['pace']}")
        self.height, self.width = self.agreement["observation.height"], self.agreement["observation.width"]
        self.choices = self.agreement["action.choices"]
        self.action = [0] * len(self.choices)
        self.x, self.y = self.width // 2, self.height // 2
        interval_s = self.agreement["inference.interval"]
        if interval_s <= 0:
            raise Refused("this body lives on a time grid, the system's interval is 0")
        beat = extent = 0.0
        tick = time.monotonic()
        while not self.desired["stopping"]:
            now = time.monotonic()
            if now >= beat:
                beat = now + HEARTBEAT_S
                self.report()
            if now >= extent:
                extent = now + EXTENT_S
                self.tell_extent()
            if now >= tick:
                self.segment_open = self.segment_open and now - tick < STALL_S
                self.pass_tick(max(0.0, now - tick))
                tick += interval_s * max(1, int((now - tick) / interval_s) + 1)  # keep the grid, skip ticks
            if header := self.hear(min(beat, extent, tick) - time.monotonic()):
                self.take(header)
        self.state, self.epoch = "stopping", self.desired["epoch"]
        self.report()
        self.tell("leave", {})

    def report(self) -> None:
        """Join, or send a heartbeat."""
        statistics = {"steps": self.sequence, "published": self.sequence, "segment": self.segment}
        fields = {"state": self.state, "epoch": self.epoch, "statistics": statistics, "asked": time.time()}
        if not self.joined:
            fields |= {"role": "body", "host": socket.gethostname(), "pid": os.getpid(), "code": "plain"}
            fields |= {"agreement": self.agreement}
            fields |= {"lineage": self.lineage} if self.lineage else {}
        self.tell("heartbeat" if self.joined else "join", fields)

    def take(self, header: dict) -> None:
        """Handle a message from the controller, or one it forwards."""
        fields = header["fields"]
        match header["type"]:
            case "joined" | "wish":
                self.joined, self.desired = True, fields["desired"]
                self.lineage = fields.get("lineage", self.lineage)
                if "clock" in fields:
                    self.set_clock(fields["asked"], fields["clock"], time.time())
            case "rejoin":
                self.joined = False
            case "refused" if fields["retry"]:
                print(f"not yet: {fields['reason']}", flush=True)
            case "refused":
                raise Refused(fields["reason"])
            case "fetch":
                self.answer(header["from"], fields)

    def set_clock(self, asked: float, hub_time: float, answered: float) -> None:
        """Estimate the hub's time from the quickest answer so far: taken about midway between question and answer."""
        if 0 <= (doubt_s := (answered - asked) / 2) < self.clock_doubt_s:
            self.clock_ahead_s, self.clock_doubt_s = hub_time - (asked + answered) / 2, doubt_s
        self.clock_doubt_s *= 1.01  # clocks drift: a later answer may be worth more than an old one

    def pass_tick(self, late_s: float) -> None:
        """Act or stand still; report at once if that has changed."""
        before = (self.state, self.epoch)
        if not self.joined and self.epoch < 0:
            return
        self.state, self.epoch = "paused" if self.desired["paused"] else "running", self.desired["epoch"]
        if self.desired["paused"]:
            self.segment_open = False  # what follows the pause does not continue what came before
        else:
            self.step(late_s)
        if (self.state, self.epoch) != before:
            self.report()

    def step(self, late_s: float) -> None:
        """Observe, act, and leave a record."""
        if not self.segment_open:
            self.segment, self.segment_open = self.segment + 1, True
        seen = self.see()
        self.action = [random.randrange(n) if random.random() < 0.1 else held
                       for n, held in zip(self.choices, self.action, strict=True)]  # fmt: skip
        moves = [(0, 1, -1)[choice % 3] * 3 for choice in (self.action * 2)[:2]]
        self.y = min(max(self.y + moves[0], 0), self.height - SQUARE)
        self.x = min(max(self.x + moves[1], 0), self.width - SQUARE)
        self.publish(seen, late_s)

    def see(self) -> bytes:
        """Return a frame (3, H, W): the square is red."""
        frame = bytearray(b"\x20") * (3 * self.height * self.width)
        for row in range(self.y, self.y + SQUARE):
            begin = row * self.width + self.x
            frame[begin : begin + SQUARE] = b"\xe0" * SQUARE
        return bytes(frame)

    def publish(self, seen: bytes, late_s: float) -> None:
        """Send a batch of one record, and retain it."""
        arrays = {
            "segment": ("int64", (1,), struct.pack("<q", self.segment)),
            "time": ("float64", (1,), struct.pack("<d", time.time() + self.clock_ahead_s)),
            "lateness": ("float32", (1,), struct.pack("<f", late_s)),
            "ending": ("uint8", (1,), b"\0"),
            "swapped": ("bool", (1,), b"\0"),
            "data/observation": ("uint8", (1, 3, self.height, self.width), seen),
            "data/action": ("int64", (1, len(self.action)), struct.pack(f"<{len(self.action)}q", *self.action)),
        }
        frames = self.frames("records", {"first": self.sequence}, f"experience/{self.name}/".encode(), arrays)
        self.experience.send_multipart(frames)
        self.retained.append((self.sequence, frames[1:]))
        self.retained_bytes += sum(map(len, frames[1:]))
        while self.retained_bytes > RETAINED_BYTES:
            self.retained_bytes -= sum(map(len, self.retained.popleft()[1]))
        self.sequence += 1

    def tell_extent(self) -> None:
        """Say which records can be fetched."""
        if self.retained:
            fields = {"range": [self.retained[0][0], self.sequence]}
            self.experience.send_multipart(self.frames("extent", fields, f"extent/{self.name}/".encode()))

    def answer(self, trainer: str, wish: dict) -> None:
        """Send a trainer what it is missing, or the first part of it, and say what is gone."""
        if wish["incarnation"] != self.incarnation or not self.retained:
            return
        topic, oldest = f"fetched/{trainer}/".encode(), self.retained[0][0]
        first, end = wish["range"]
        end = min(end, self.sequence)
        gone = [[first, min(oldest, end)]] if first < oldest else []
        if gone:
            self.tell_extent()  # first, so that what is sent does not wait for what is gone
        begin = max(first, oldest)
        stop, nbytes = begin, 0
        while stop < min(end, begin + BATCHES_AN_ANSWER) and nbytes < BYTES_AN_ANSWER:
            frames = self.retained[stop - oldest][1]
            self.experience.send_multipart([topic, *frames])
            nbytes += sum(map(len, frames))
            stop += 1
        told = [first, max(first, stop if begin < end else end)]
        self.experience.send_multipart(self.frames("fetched", {"range": told, "gone": gone}, topic))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="a body in plain Python")
    parser.add_argument("--hub", default=os.environ.get("AMI_HUB", "127.0.0.1:5550"), metavar="HOST:PORT")
    parser.add_argument("--name", default="body")
    arguments = parser.parse_args()
    host, _, port = arguments.hub.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--hub {arguments.hub} is not host:port")
    body = PlainBody(host, int(port), arguments.name)
    try:
        body.live()
    except Refused as error:
        sys.exit(f"ERROR {error}")
    except KeyboardInterrupt:
        body.tell("leave", {})


if __name__ == "__main__":
    main()
