"""Hundreds of thousands of frames that nobody should send, on every port of a living system; garbage below ZeroMQ."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq
from processes import Process, System, poll_for

from ami_shared import wire
from ami_shared.bus import Port
from ami_shared.errors import AmiError
from ami_shared.records import Record, RecordBatch
from ami_shared.snapshots import Snapshot
from mutations import Frames, mutated, random_frames

MakeSystem = Callable[..., System]
MESSAGES = 100_000  # random ones, and as many mutated ones; all have two frames at least


def kept_messages(kind: str) -> list[Frames]:
    """Return the messages of a kind as each version of the protocol has them."""
    folder = Path(__file__).parents[1] / "shared"
    of_all = [kept for n in (1, 2) for kept in json.loads((folder / f"kept_messages_{n}.json").read_text())]
    return [[base64.b64decode(frame) for frame in kept["frames"]] for kept in of_all if kept["type"] == kind]


def large_messages() -> dict[str, Frames]:
    """Return records and a snapshot whose arrays have frames of their own."""
    frames = np.zeros((2, 3, 36, 36), np.uint8)
    records = [Record(0, n, float(n), 0.0, {"m": 1}, {"observation": frame}) for n, frame in enumerate(frames)]
    arrays = {name: np.ones((32, 32), np.float32) for name in ("first", "second", "third")}
    made = (
        RecordBatch.stack("body", "1", records).to_message(),
        Snapshot("image_encoder", 1, 1.0, arrays).to_message("image_vae", "1"),
    )
    return {message.kind: [bytes(frame) for frame in wire.encode(message)] for message in made}


LARGE = large_messages()
KINDS = [
    kept["type"] for kept in json.loads((Path(__file__).parents[1] / "shared" / "kept_messages_2.json").read_text())
]
KEPT = {kind: [*kept_messages(kind), *([LARGE[kind]] if kind in LARGE else [])] for kind in KINDS}
COMMANDS = ("pause", "resume", "shutdown", "save")  # a stranger may command for as long as there are no keys
ON_PORT = {
    Port.CONTROL: [kind for kind in KEPT if kind not in (*COMMANDS, "records", "snapshot", "notice", "places")],
    Port.EXPERIENCE_IN: ["records", "extent", "fetched", "places"],
    Port.PARAMETERS_IN: ["snapshot", "notice", "settled"],
}
TOPICS = {
    Port.EXPERIENCE_IN: (b"experience/", b"places/", b"extent/", b"fetched/image_vae/"),
    Port.PARAMETERS_IN: (b"parameters/", b"notices/", b"parameters/image_encoder/", b"notices/image_encoder/"),
}

pytestmark = pytest.mark.slow


def behind_a_topic(chance: random.Random, topics: Sequence[bytes]) -> Frames:
    """Return some frames of anything, behind a topic that somebody hears."""
    return [chance.choice(topics) + chance.randbytes(2), *random_frames(chance)]


def wrong_behind_its_topic(frames: Frames, chance: random.Random) -> Frames:
    """Return a message with something wrong with it, the topic left as it is."""
    return [frames[0], *mutated(frames[1:], chance)]


class Living:
    """A system at a hundred steps a second that must not be moved by anything."""

    def __init__(self, system: System, keys: bool = False) -> None:
        self.system = system
        if keys:
            system.use_keys()
        self.processes = [system.start(name) for name in ("controller", "image_vae", "body")]
        system.wait_running()
        poll_for(lambda: self.received > 50, what="records flow")
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.skipped = system.service("body")["skipped_ticks"]
        self.memory = {process.name: self.memory_of(process) for process in self.processes}

    @staticmethod
    def memory_of(process: Process) -> int:
        return int(psutil.Process(process.pid).memory_info().rss)

    @property
    def received(self) -> int:
        try:
            return int(self.system.status()["experience"][0]["received"].get("image_vae", 0))
        except (AmiError, IndexError):
            return 0

    def flood(self, kind: int, port: Port, messages: Iterator[Frames]) -> None:
        """Send all of them, at a pace that the hub's queues can hold."""
        with self.context.socket(kind) as stranger:
            stranger.set_hwm(1_000)
            stranger.linger = 2_000
            stranger.connect(self.system.hub.endpoint(port))
            time.sleep(0.3)
            for n, frames in enumerate(messages):
                stranger.send_multipart(frames)
                if n % 50 == 0:
                    time.sleep(0.001)

    def unmoved(self) -> None:
        """Everybody is alive and at work, no record was lost, hardly a step left out, memory bounded."""
        self.context.destroy(linger=0)
        assert [psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE for process in self.processes] == [
            True
        ] * 3
        self.system.wait_running()
        before = self.received
        poll_for(lambda: self.received > before + 100, what="records flow on")
        self.system.command("pause")
        told = poll_for(lambda: self.all_arrived(), what="all arrived")
        assert told["lost"]["image_vae"] == 0
        assert told["overflowed"] == 0
        body = self.system.service("body")
        skipped = body["skipped_ticks"] - self.skipped
        assert skipped < 100 + body["steps"] / 20, "the flood has to share two cores with a hundred steps a second"
        for process in self.processes:
            assert self.memory_of(process) < self.memory[process.name] + (300 << 20), process.name

    def all_arrived(self) -> dict[str, dict[str, int]] | None:
        stream = next(of for of in self.system.status()["experience"] if of["body"] == "body")
        return stream if stream["received"]["image_vae"] + stream["lost"]["image_vae"] == stream["published"] else None


@pytest.fixture
def living(make_system: MakeSystem) -> Living:
    return Living(make_system("experiment=noise", "inference.interval=0.01"))


def counted(living: Living) -> int:
    status = living.system.status()
    hub = status["hub"]
    return int(hub["wire_errors"] + hub["snapshots_refused"] + sum(s.get("wire_errors", 0) for s in status["services"]))


@pytest.mark.parametrize("port", [Port.CONTROL, Port.EXPERIENCE_IN, Port.PARAMETERS_IN], ids=lambda port: port.name)
def test_junk_at_a_port_that_listens_is_counted_and_moves_nobody(
    living: Living, port: Port, chance: random.Random
) -> None:
    topics = TOPICS.get(port, (b"",))
    kind = zmq.DEALER if port is Port.CONTROL else zmq.PUB
    living.flood(kind, port, (behind_a_topic(chance, topics) for _ in range(MESSAGES)))
    living.flood(
        kind,
        port,
        (wrong_behind_its_topic(chance.choice(KEPT[chance.choice(ON_PORT[port])]), chance) for _ in range(MESSAGES)),
    )
    poll_for(lambda: counted(living) > MESSAGES * 3 // 4, what="much of it arrived, though queues drop, and is told")
    living.unmoved()


@pytest.mark.parametrize("port", [Port.EXPERIENCE_OUT, Port.PARAMETERS_OUT], ids=lambda port: port.name)
def test_junk_at_a_port_that_speaks_moves_nobody(living: Living, port: Port, chance: random.Random) -> None:
    def wishes() -> Iterator[Frames]:
        for _ in range(2 * MESSAGES):
            yield [chance.choice((b"\x01", b"\x00", b"\x02", b"")) + chance.randbytes(chance.choice((0, 3, 40)))]
        for _ in range(2 * MESSAGES):
            topic = chance.choice(TOPICS[Port.EXPERIENCE_IN] + TOPICS[Port.PARAMETERS_IN])
            yield mutated([chance.choice((b"\x01", b"\x00")) + topic], chance)[:1] or [b""]

    living.flood(zmq.XSUB, port, wishes())
    living.unmoved()


def test_garbage_below_zeromq_moves_nobody(living: Living, chance: random.Random) -> None:
    endings = []
    for n in range(2_000):
        port = living.system.hub.port + n % len(Port)
        stranger = socket.create_connection((living.system.hub.host, port), timeout=5.0)
        stranger.sendall(
            chance.choice((b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f")) + chance.randbytes(64)
        )
        endings.append(stranger)
        if n % 2:
            stranger.close()
        if len(endings) > 200:
            endings.pop(0).close()
    assert living.system.status()["hub"]["handshakes_failed"] > 1_000
    for stranger in endings:
        stranger.close()
    living.unmoved()


def test_a_minute_of_strangers_at_a_hub_with_keys_moves_nobody(make_system: MakeSystem, chance: random.Random) -> None:
    """2,000 idle connections and half-finished handshakes, and junk at full speed on every port all the while."""
    living = Living(make_system("experiment=noise", "inference.interval=0.01"), keys=True)
    hub, ending = living.system.hub, time.monotonic() + 60.0
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)

    def connect(n: int) -> socket.socket:
        stranger = socket.create_connection((hub.host, hub.port + n % len(Port)), timeout=5.0)
        if n % 2:
            stranger.sendall(greeting[: chance.randrange(1, len(greeting) + 1)])
        return stranger

    idle = [connect(n) for n in range(2_000)]
    junk = chance.randbytes(1 << 16)
    sent = 0
    while time.monotonic() < ending:
        idle.append(connect(sent))
        idle.pop(0).close()
        with socket.create_connection((hub.host, hub.port + sent % len(Port)), timeout=5.0) as flooding:
            flooding.settimeout(1.0)
            with contextlib.suppress(OSError):
                flooding.sendall(chance.choice((b"", greeting)) + junk)
        sent += 1
    print(f"{sent} floods, {living.system.status()['hub']['handshakes_failed']} handshakes failed")
    for stranger in idle:
        stranger.close()
    assert living.system.status()["hub"]["handshakes_failed"] > 2_000
    living.unmoved()
