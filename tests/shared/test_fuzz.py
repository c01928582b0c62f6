"""Hundreds of thousands of frames that nobody should send: every reader takes or refuses them, in bounded time."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from ami_controller.checkpoint_files import CheckpointFolder
from ami_controller.checkpoint_writer import Failed, Written
from ami_controller.checkpointing import Checkpointing, Schedule
from ami_controller.coordinator import Coordinator
from ami_controller.lifecycle import Lifecycle
from ami_controller.registry import Registry
from ami_controller.state import RunState
from ami_shared import wire
from ami_shared.checkpoint_part import CheckpointPart
from ami_shared.errors import WireError
from ami_shared.experience import Extent, Fetch, Fetched, Places
from ami_shared.membership import Identity, Membership
from ami_shared.records import RecordBatch
from ami_shared.settled import Settled
from ami_shared.snapshots import Notice, Snapshot
from ami_shared.wire import Message
from mutations import Frames, mutated, random_frames

MESSAGES = [5_000, pytest.param(200_000, marks=pytest.mark.slow)]
KEPT: list[Frames] = [
    [base64.b64decode(frame) for frame in kept["frames"]]
    for path in sorted(Path(__file__).parent.glob("kept_messages_*.json"))
    for kept in json.loads(path.read_text())
]
OF_CHECKPOINTS = [frames for frames in KEPT if wire.decode(frames).kind in {"save", "get_part", "part", "forget"}]


class Nothing:
    """A parameter store, a learning record, a writer and a link for which nothing matters."""

    checkpoint: Mapping[str, object] = {}

    def put(self, job: object) -> None:
        pass

    def take_results(self) -> list[Written | Failed]:
        return []

    def send(self, message: Message) -> None:
        pass

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
    registry = Registry({})
    folder, schedule = CheckpointFolder(Path("nowhere")), Schedule(None, 60.0, 30.0)
    saves = Checkpointing(folder, Nothing(), schedule, registry, [], {}, list, RunState(), "", Nothing(), None, 0.0)
    coordinator = Coordinator(registry, Lifecycle(), Nothing(), Nothing(), saves, {}, lambda now: {}, lambda: None)
    part = CheckpointPart(Identity("body", "body"), Nothing())
    membership = Membership(Identity("body", "body"), lambda desired: None)
    return {
        "records": RecordBatch.from_message,
        "extent": Extent.from_message,
        "fetch": Fetch.from_message,
        "places": Places.from_message,
        "fetched": Fetched.from_message,
        "snapshot": Snapshot.from_message,
        "part of a snapshot": lambda message: Snapshot.from_message(message, lasting=True),
        "notice": Notice.from_message,
        "settled": Settled.from_message,
        "coordinator": lambda message: coordinator.handle(b"peer", message, 1.0),
        "checkpoint part": part.heard,
        "membership": lambda message: membership.handle(message, 1.0),
    }


@pytest.mark.parametrize("count", MESSAGES)
@pytest.mark.parametrize("kind", ["random", "mutated"])
def test_every_reader_takes_or_refuses_whatever_comes(kind: str, count: int, chance: random.Random) -> None:
    read = readers()
    memory_before, longest = psutil.Process().memory_info().rss, 0.0
    undecodable, refused, taken = 0, dict.fromkeys(read, 0), dict.fromkeys(read, 0)
    for n in range(count):
        kept = KEPT if n % 4 else OF_CHECKPOINTS  # few others are a checkpoint's
        frames = random_frames(chance) if kind == "random" else mutated(chance.choice(kept), chance)
        begin = time.thread_time()
        try:
            message = wire.decode(frames)
        except WireError:
            undecodable += 1
        else:
            for name, take in read.items():
                try:
                    take(message)
                    taken[name] += 1
                except WireError:
                    refused[name] += 1
        longest = max(longest, time.thread_time() - begin)
    print(f"{undecodable} of {count} undecodable; refused {refused}; taken {taken}")
    if kind == "random":
        assert undecodable > 0.99 * count
    else:
        assert 0.3 * count < undecodable < 0.95 * count, "some are wrong on the outside, some on the inside only"
        assert undecodable + sum(refused.values()) > count // 2
        assert all(refused.values())
        assert all(taken.values())
    assert longest < 1.0
    assert psutil.Process().memory_info().rss - memory_before < 100 << 20
