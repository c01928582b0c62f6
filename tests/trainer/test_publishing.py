from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import zmq
from torch import nn

from ami_shared import wire
from ami_shared.bus import PARAMETERS, HubAddress, Port, SocketOptions, make_socket
from ami_shared.membership import Identity
from ami_shared.snapshots import Snapshot
from ami_trainer.publishing import SnapshotPublisher


class Stage:
    """A publisher of one model, and a subscriber bound where the hub would be."""

    def __init__(self, interval_s: float = 0.0) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        options = SocketOptions(100, PARAMETERS.max_frame_bytes, b"", (b"",))
        self.subscriber = make_socket(self.context, zmq.SUB, options=options)
        port = self.subscriber.bind_to_random_port("tcp://127.0.0.1")
        hub = HubAddress("127.0.0.1", port - Port.PARAMETERS_IN.value)
        self.model = nn.Linear(512, 512)
        identity = Identity("trainer", "trainer")
        self.publisher = SnapshotPublisher(self.context, hub, identity, {"model": self.model}, interval_s)
        self.publisher.start()
        self.subscriber.poll(300)  # lets it answer the new connection with its subscription

    def fill(self, value: float) -> None:
        with torch.no_grad():
            self.model.weight.fill_(value)
            self.model.bias.fill_(value)

    def receive(self, timeout_ms: int = 2_000) -> Snapshot | None:
        if not self.subscriber.poll(timeout_ms):
            return None
        return Snapshot.from_message(wire.decode(self.subscriber.recv_multipart()))

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


def test_a_snapshot_is_never_torn_by_the_training_that_goes_on(stage: Stage) -> None:
    for step in range(60):
        stage.fill(float(step))
        stage.publisher.offer_if_due(float(step))
        stage.fill(-1.0)
    time.sleep(0.3)
    received = []
    while snapshot := stage.receive(200):
        values = {float(v) for array in snapshot.arrays.values() for v in (array.min(), array.max())}
        assert len(values) == 1, "one generation"
        assert values != {-1.0}
        assert values == {float(snapshot.version - 1)}
        received.append(snapshot.version)
    assert received == sorted(set(received))
    if received[-1] < 60:  # a full queue drops the newest; the controller's next answer heals that
        stage.publisher.repeat_for({"model": received[-1]})
        snapshot = stage.receive()
        assert snapshot is not None
        assert snapshot.version == 60, "the newest is never left out"


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


def test_a_snapshot_that_the_controller_does_not_know_is_sent_again(stage: Stage) -> None:
    stage.publisher.offer_if_due(0.0)
    first = stage.receive()
    assert first is not None
    stage.publisher.repeat_for({"model": 1})
    assert stage.receive(300) is None
    stage.publisher.repeat_for({})
    again = stage.receive()
    assert again is not None
    assert again.version == first.version
