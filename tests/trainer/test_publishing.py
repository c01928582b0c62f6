from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq
from torch import nn

from ami_shared import limits, wire
from ami_shared.bus import PARAMETERS, HubAddress, Port, SocketOptions, make_socket
from ami_shared.membership import Identity
from ami_shared.sending import send_in_place
from ami_shared.shared_memory import Reader, can_share
from ami_shared.snapshots import NOTICE, NOTICE_TOPIC, Notice, Snapshot
from ami_shared.wire import Message
from ami_trainer import publishing
from ami_trainer.publishing import Model, SnapshotPublisher
from subscribing import wait_subscribed

PollFor = Callable[..., Any]


class Stage:
    """A publisher of one model, and a subscriber bound where the hub would be."""

    def __init__(self, interval_s: float = 0.0, subscribed: bytes = b"", halved: bool = False) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        options = SocketOptions(100, PARAMETERS.max_frame_bytes, b"", (subscribed,))
        self.subscriber = make_socket(self.context, zmq.SUB, options=options)
        port = self.subscriber.bind_to_random_port("tcp://127.0.0.1")
        hub = HubAddress("127.0.0.1", port - Port.PARAMETERS_IN.value)
        self.model = nn.Linear(512, 512)
        identity = Identity("trainer", "trainer")
        self.publisher = SnapshotPublisher(
            self.context, hub, identity, {"model": self.model}, interval_s, halved=halved
        )
        wait_subscribed(self.subscriber, self.publisher._socket)
        self.publisher.start()

    def fill(self, value: float) -> None:
        with torch.no_grad():
            self.model.weight.fill_(value)
            self.model.bias.fill_(value)

    def receive(self, timeout_ms: int = 30_000) -> Snapshot | None:
        message = self.next(timeout_ms)
        while message and message.kind == NOTICE:
            message = self.next(timeout_ms)
        return Snapshot.from_message(message) if message else None

    def next(self, timeout_ms: int = 30_000) -> Message | None:
        return wire.decode(self.subscriber.recv_multipart()) if self.subscriber.poll(timeout_ms) else None

    def close(self) -> None:
        self.publisher.close()
        self.context.destroy(linger=0)


@pytest.fixture
def stage() -> Iterator[Stage]:
    made = Stage()
    yield made
    made.close()


def test_versions_grow_from_what_the_system_knows(stage: Stage) -> None:
    stage.publisher.continue_from({"model": 41, "other": 99})
    assert stage.publisher.offer_if_due(1.0)
    snapshot = stage.receive()
    assert snapshot is not None
    assert (snapshot.model, snapshot.version) == ("model", 42)


def test_a_snapshot_is_never_torn_by_the_training_that_goes_on(stage: Stage, poll_for: PollFor) -> None:
    for step in range(60):
        stage.fill(float(step))
        stage.publisher.offer_if_due(float(step))
        stage.fill(-1.0)
    publisher = stage.publisher
    poll_for(lambda: publisher.published + publisher.counters()["snapshots_overtaken"] == 60)
    received = [0]
    deadline = time.monotonic() + 30.0
    while received[-1] < 60:
        snapshot = stage.receive(1_000)
        if snapshot is None:  # a full queue drops the newest; the controller's next answer heals that
            assert time.monotonic() < deadline, "the newest is never left out"
            publisher.repeat_for({"model": received[-1]})
            continue
        values = {float(v) for array in snapshot.arrays.values() for v in (array.min(), array.max())}
        assert len(values) == 1, "one generation"
        assert values != {-1.0}
        assert values == {float(snapshot.version - 1)}
        received.append(snapshot.version)
    assert received == sorted(set(received))


def test_what_a_newer_one_overtakes_is_counted_and_never_sent(
    context: zmq.Context[zmq.Socket[bytes]], hub: HubAddress
) -> None:
    models = {"model": nn.Linear(3, 3)}
    publisher = SnapshotPublisher(context, hub, Identity("trainer", "trainer"), models, 0.0)
    for _ in range(3):
        publisher.offer()
    publisher.start()
    publisher.close()
    assert publisher.versions == {"model": 3}
    told = publisher.counters()
    assert (told["snapshots_published"], told["snapshots_overtaken"]) == (1, 2)


def test_the_interval_is_kept() -> None:
    stage = Stage(interval_s=1.0)
    try:
        assert [stage.publisher.offer_if_due(now) for now in (0.0, 0.5, 1.0, 1.9, 2.5)] == [
            True,
            False,
            True,
            False,
            True,
        ]
    finally:
        stage.close()


def test_a_snapshot_that_the_controller_does_not_know_is_sent_again(stage: Stage, poll_for: PollFor) -> None:
    stage.publisher.offer_if_due(0.0)
    first = stage.receive()
    assert first is not None
    stage.publisher.repeat_for({"model": 1})
    assert stage.receive(300) is None
    poll_for(lambda: stage.publisher._models["model"].line_is_free)
    stage.publisher.repeat_for({})
    again = stage.receive()
    assert again is not None
    assert again.version == first.version


def test_what_is_on_its_way_is_not_sent_twice(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.publisher.offer_if_due(0.0)
    assert stage.receive() is not None
    with monkeypatch.context() as busy:
        busy.setattr(Model, "line_is_free", False)
        stage.publisher.repeat_for({})
        assert stage.receive(500) is None
    time.sleep(1.0)  # repeats are this far apart
    stage.publisher.repeat_for({})
    assert stage.receive() is not None


def test_who_listens_to_notices_only_sees_the_memory_and_no_bytes_are_sent() -> None:
    stage, reader = Stage(subscribed=NOTICE_TOPIC), Reader()
    try:
        held = []
        for step in range(1, 8):
            stage.fill(float(step))
            stage.publisher.offer_if_due(float(step))
            stage.fill(-1.0)
            message = stage.next()
            assert message is not None
            assert message.kind == NOTICE
            snapshot = Notice.from_message(message).snapshot(reader)
            if not can_share():
                assert snapshot is None
                continue
            assert snapshot is not None
            held.append(snapshot)
        for step, snapshot in enumerate(held, 1):
            assert snapshot.version == step
            values = {float(v) for array in snapshot.arrays.values() for v in (array.min(), array.max())}
            assert values == {float(step)}, "whoever looks at it keeps it as it was"
        assert stage.next(200) is None
    finally:
        stage.close()


def test_bfloat16_goes_over_the_wire_and_full_precision_through_memory() -> None:
    stage, reader = Stage(halved=True), Reader()
    try:
        stage.fill(1.00390625 + 1 / 1024)
        stage.publisher.offer_if_due(0.0)
        notice, sent = stage.next(), stage.next()
        assert notice is not None
        assert sent is not None
        assert sum(array.nbytes for array in sent.arrays.values()) == 2 * (512 * 512 + 512)
        arrived = Snapshot.from_message(sent).arrays["weight"]
        assert arrived.dtype == "float32"
        assert set(arrived.flatten()) == {1.0078125}, "the nearest number of eight significant bits"
        if can_share():
            seen = Notice.from_message(notice).snapshot(reader)
            assert seen is not None
            assert set(seen.arrays["weight"].flatten()) == {1.00390625 + 1 / 1024}
    finally:
        stage.close()


def test_parameters_that_are_not_finite_are_kept_from_everybody(stage: Stage, poll_for: Callable[..., object]) -> None:
    for refused, value in enumerate((float("nan"), float("inf")), start=1):
        stage.fill(value)
        stage.publisher.offer()
        poll_for(lambda refused=refused: stage.publisher.poisoned == refused)
    stage.fill(3e38)
    stage.publisher.offer()
    received = stage.receive()
    assert received is not None
    assert received.version == 3, "a sum beyond all numbers does not make its parts infinite"
    assert stage.publisher.poisoned == 2


class Line:
    """What takes a message's memory as slowly as a test likes."""

    def __init__(self) -> None:
        self.done = False


def test_what_comes_faster_than_the_line_takes_it_goes_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, poll_for: Callable[..., Any]
) -> None:
    monkeypatch.setattr(limits, "SNAPSHOT_PART_BYTES", 1_000)  # the weight and the bias are a part each
    stage = Stage(subscribed=b"parameters/")
    lines: list[Line] = []

    def slowly(socket: Any, frames: Any) -> list[Any]:
        send_in_place(socket, frames)
        lines.append(Line())
        return [lines[-1]]

    monkeypatch.setattr(publishing, "send_in_place", slowly)
    try:
        stage.publisher.offer_if_due(0.0)
        poll_for(lambda: len(lines) == 2)
        for now in range(1, 9):
            stage.publisher.offer_if_due(float(now))
            poll_for(lambda now=now: stage.publisher.published == now + 1)
        assert len(lines) == 2, "the others wait"
        for line in lines:
            line.done = True
        poll_for(lambda: len(lines) == 4)
        versions = [snapshot.version for _ in range(4) if (snapshot := stage.receive())]
        assert versions == [1, 1, 9, 9]
        assert stage.receive(300) is None
    finally:
        stage.close()
