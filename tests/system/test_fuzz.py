"""Hundreds of thousands of frames that nobody should send: refused, counted, and of no consequence for anybody else."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import zmq
from processes import System, poll_for

from ami_controller.coordinator import Coordinator
from ami_controller.lifecycle import Lifecycle
from ami_controller.registry import Registry
from ami_shared import wire
from ami_shared.bus import Port
from ami_shared.errors import WireError
from ami_shared.experience import Extent, Fetch, Fetched
from ami_shared.membership import Identity, Membership
from ami_shared.records import RecordBatch
from ami_shared.settled import Settled
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

FRAMES = 200_000
SEED = random.SystemRandom().randrange(1 << 32)
Frames = list[bytes]
KEPT: dict[str, Frames] = {
    kept["type"]: [base64.b64decode(frame) for frame in kept["frames"]]
    for kept in json.loads((Path(__file__).parents[1] / "shared" / "kept_messages_1.json").read_text())
}
COMMANDS = ("pause", "resume", "shutdown")  # a stranger may command the system for as long as there are no keys


@pytest.fixture
def chance() -> random.Random:
    print(f"seed {SEED}")
    return random.Random(SEED)


def random_frames(chance: random.Random) -> Frames:
    """Return some frames of anything."""
    return [chance.randbytes(chance.choice((0, 1, 9, 60, 300))) for _ in range(chance.randrange(1, 6))]


def mutated(frames: Sequence[bytes], chance: random.Random) -> Frames:
    """Return a message's frames with one to four things wrong with them."""
    made = [bytearray(frame) for frame in frames]
    for _ in range(chance.randrange(1, 5)):
        frame = chance.choice(made) if made else bytearray()
        at = chance.randrange(len(frame) + 1)
        match chance.randrange(8):
            case 0 | 1 | 2 if at < len(frame):
                frame[at] ^= 1 << chance.randrange(8)
            case 3:
                frame[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                del frame[at : at + chance.randrange(1, 9)]
            case 5:
                del frame[at:]
            case 6 if made:
                made.insert(chance.randrange(len(made)), bytearray(frame))
            case 7 if made:
                made.pop(chance.randrange(len(made)))
    return [bytes(frame) for frame in made]


class Nothing:
    """A parameter store and a learning record for which nothing matters."""

    def versions(self) -> dict[str, int]:
        return {}

    def newer_than(self, model: str, version: int) -> None:
        return None

    def put_points(self, *about: object) -> None:
        pass

    def put_picture(self, *about: object) -> None:
        pass


def readers() -> dict[str, Callable[[Message], object]]:
    """Return everything that takes messages, by name."""
    coordinator = Coordinator(Registry({}), Lifecycle(), Nothing(), Nothing(), {}, lambda now: {}, lambda: None)
    membership = Membership(Identity("body", "body"), lambda desired: None)
    return {
        "records": RecordBatch.from_message,
        "extent": Extent.from_message,
        "fetch": Fetch.from_message,
        "fetched": Fetched.from_message,
        "snapshot": Snapshot.from_message,
        "settled": Settled.from_message,
        "coordinator": lambda message: coordinator.handle(b"peer", message, 1.0),
        "membership": lambda message: membership.handle(message, 1.0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "mutated"])
def test_every_reader_takes_or_refuses_whatever_comes(kind: str, chance: random.Random) -> None:
    read, kept = readers(), list(KEPT.values())
    memory_before, longest, refused = psutil.Process().memory_info().rss, 0.0, 0
    for _ in range(FRAMES):
        frames = random_frames(chance) if kind == "random" else mutated(chance.choice(kept), chance)
        begin = time.perf_counter()
        try:
            message = wire.decode(frames)
        except WireError:
            refused += 1
        else:
            for take in read.values():
                try:
                    take(message)
                except WireError:
                    refused += 1
        longest = max(longest, time.perf_counter() - begin)
    assert refused > FRAMES // 2
    assert longest < 1.0
    assert psutil.Process().memory_info().rss - memory_before < 100 << 20


def junk_for(port: Port, chance: random.Random) -> Iterator[Frames]:
    """Yield random and mutated messages, as many of each as there should be, such as pass the port's subscriptions."""
    theirs = {
        Port.EXPERIENCE_IN: ["records", "extent", "fetched"],
        Port.PARAMETERS_IN: ["snapshot", "settled"],
    }.get(port, [kind for kind in KEPT if kind not in COMMANDS])
    for n in range(2 * FRAMES):
        topic, *rest = KEPT[chance.choice(theirs)]
        yield [topic, *(random_frames(chance) if n % 2 else mutated(rest, chance))]


@pytest.mark.slow
@pytest.mark.parametrize("port", Port)
def test_a_flood_of_junk_on_a_port_harms_nobody_else(
    port: Port, make_system: Callable[..., System], chance: random.Random
) -> None:
    system = make_system("experiment=noise")
    services = [system.start(name) for name in ("controller", "image_vae", "body")]
    system.wait_running()
    poll_for(lambda: system.model()["version"] >= 2, 30.0, "everything at work")
    memory_before = [psutil.Process(service.pid).memory_info().rss for service in services]

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    kinds = {Port.CONTROL: zmq.DEALER, Port.EXPERIENCE_IN: zmq.XPUB, Port.PARAMETERS_IN: zmq.XPUB}
    stranger = context.socket(kinds.get(port, zmq.XSUB))
    if stranger.socket_type == zmq.XPUB:
        stranger.setsockopt(zmq.XPUB_NODROP, 1)
    stranger.sndtimeo, stranger.linger = 20_000, 5_000
    stranger.connect(system.hub.endpoint(port))
    if stranger.socket_type == zmq.XPUB:
        stranger.recv()  # somebody listens
    for frames in junk_for(port, chance):
        try:
            stranger.send_multipart(frames)
        except zmq.Again:
            if stranger.socket_type != zmq.XPUB:
                raise
    stranger.close()
    context.destroy()

    before = poll_for(lambda: system.status()["experience"], 30.0, "the controller answers")[0]["received"]["image_vae"]
    poll_for(lambda: system.status()["experience"][0]["received"]["image_vae"] > before + 10, 30.0, "life goes on")
    version = system.model()["version"]
    poll_for(lambda: system.model()["used"].get("body", 0) > version, 30.0, "parameters still arrive")
    assert all(service.popen.poll() is None for service in services)
    assert next(of for of in system.status()["experience"] if of["body"] == "body")["lost"] == {"image_vae": 0}
    grown = [psutil.Process(s.pid).memory_info().rss - m for s, m in zip(services, memory_before, strict=True)]
    assert max(grown) < 300 << 20, grown
    counted = system.status()["hub"]["wire_errors"] + system.service("image_vae")["wire_errors"]
    if port in (Port.CONTROL, Port.EXPERIENCE_IN):
        assert counted > FRAMES // 100
    assert system.ami("shutdown").returncode == 0
    assert not any("Traceback" in service.output for service in services)
