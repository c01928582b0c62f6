"""The body's two streams with real sockets: records out, snapshots in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq
from torch import nn

from ami_inference.experience import ExperienceSender
from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, SocketOptions, make_socket
from ami_shared.models.receiver import ParameterReceiver
from ami_shared.models.replicas import Replicas
from ami_shared.records import Record, RecordBatch
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]


def record(sequence: int) -> Record:
    return Record(0, sequence, time.time(), 0.0, {"m": 1}, {"n": np.array(sequence)})


@pytest.fixture
def trainer(context: Context, hub: HubAddress) -> zmq.Socket[bytes]:
    """The stream's other end: it stands where the hub's forwarder would be."""
    options = SocketOptions(subscriptions=(b"experience/",))
    return make_socket(context, zmq.SUB, bind=hub.endpoint(Port.EXPERIENCE_IN), options=options)


@pytest.fixture
def sender(context: Context, hub: HubAddress, trainer: zmq.Socket[bytes]) -> Iterator[ExperienceSender]:
    made = ExperienceSender(context, hub, "body", "inc")
    trainer.poll(200)  # lets it answer the new connection with its subscription
    yield made
    if made.is_alive():
        made.close()


def received(trainer: zmq.Socket[bytes], timeout_ms: int = 1_000) -> RecordBatch:
    assert trainer.poll(timeout_ms), "no batch came"
    batch = RecordBatch.from_message(wire.decode(trainer.recv_multipart()))
    numbers = batch.data["n"].tolist()
    assert numbers == list(range(batch.first_sequence, batch.first_sequence + len(batch))), "labelled as they are"
    return batch


def test_records_leave_in_full_batches(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    for n in range(2 * limits.BATCH_RECORDS):
        sender.put(record(n))
    sender.start()
    batches = [received(trainer), received(trainer)]
    assert [(b.first_sequence, len(b)) for b in batches] == [(0, 16), (16, 16)]
    assert (batches[0].body, batches[0].incarnation) == ("body", "inc")
    sender.close()
    assert sender.published == 32
    assert sender.bytes_sent > 0


def test_a_single_record_does_not_wait_for_others(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    sender.start()
    sender.put(record(0))
    assert len(received(trainer, timeout_ms=int(limits.BATCH_AGE * 1_000) + 500)) == 1


def test_what_is_queued_at_the_end_is_sent(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    for n in range(18):
        sender.put(record(n))
    sender.start()
    sender.close()
    assert not sender.is_alive()
    assert [len(received(trainer)) for _ in range(2)] == [16, 2]


def test_a_full_queue_drops_the_oldest_counts_them_and_never_blocks(
    sender: ExperienceSender, trainer: zmq.Socket[bytes]
) -> None:
    for n in range(limits.EXPERIENCE_QUEUE + 5):
        sender.put(record(n))
    assert sender.overflowed == 5
    sender.start()
    assert received(trainer).first_sequence == 5


def test_a_batch_never_spans_records_that_were_dropped(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    for n in (0, 1, 2, 7, 8, 20):
        sender.put(record(n))
    sender.start()
    sender.close()
    batches = [received(trainer) for _ in range(3)]
    assert [(b.first_sequence, len(b)) for b in batches] == [(0, 3), (7, 2), (20, 1)]


def test_without_a_hub_nothing_blocks(context: Context, hub: HubAddress) -> None:
    sender = ExperienceSender(context, hub, "body", "inc")
    sender.start()
    begin = time.monotonic()
    for n in range(3_000):
        sender.put(record(n))
    assert time.monotonic() - begin < 1.0
    sender.close()
    assert not sender.is_alive()


class Body:
    """Replicas of one model that follow the stream."""

    def __init__(self, context: Context, hub: HubAddress) -> None:
        self.hub_end = make_socket(context, zmq.PUB, bind=hub.endpoint(Port.PARAMETERS_OUT))
        self.replicas = Replicas({"encoder": nn.Linear(3, 2)})
        self.receiver = ParameterReceiver(context, hub, self.replicas, ["encoder"])
        self.receiver.start()

    def newest(self) -> int:
        return self.replicas.newest_versions()["encoder"]


@pytest.fixture
def body(context: Context, hub: HubAddress) -> Iterator[Body]:
    made = Body(context, hub)
    yield made
    made.receiver.close()
    assert not made.receiver.is_alive()


def snapshot(version: int, model: str = "encoder", size: int = 2) -> Message:
    arrays = {"weight": np.full((2, 3), version, np.float32), "bias": np.full(size, version, np.float32)}
    return Snapshot.seal(model, version, time.time(), arrays).to_message("trainer", "1")


def test_snapshots_of_its_models_reach_the_replicas(body: Body, poll_for: PollFor) -> None:
    def arrives() -> bool:
        body.hub_end.send_multipart(wire.encode(snapshot(9, model="encoder2")))
        body.hub_end.send_multipart(wire.encode(snapshot(2)))
        return body.newest() == 2

    poll_for(arrives)
    assert body.receiver.received == 1
    assert body.receiver.wire_errors == 0


def test_snapshots_that_are_torn_or_do_not_fit_are_counted_and_the_stream_goes_on(
    body: Body, poll_for: PollFor
) -> None:
    def arrives() -> bool:
        body.hub_end.send_multipart(wire.encode(snapshot(1)))
        return body.newest() == 1

    poll_for(arrives)
    torn = [bytearray(frame) for frame in wire.encode(snapshot(5))]
    torn[2][3] ^= 4
    topic = torn[0]
    for frames in (torn, wire.encode(snapshot(6, size=3)), [topic, b"\xc1"], [topic]):
        body.hub_end.send_multipart(frames)
    poll_for(lambda: body.receiver.wire_errors == 4)
    body.hub_end.send_multipart(wire.encode(snapshot(7)))
    poll_for(lambda: body.newest() == 7)
    assert body.replicas.refused == 1


def test_what_the_controller_has_newer_is_missing(body: Body) -> None:
    assert body.receiver.missing({}) == {}
    assert body.receiver.missing({"encoder": 3, "other": 9}) == {"encoder": 0}
    body.receiver.take(snapshot(3))
    assert body.receiver.missing({"encoder": 3}) == {}
    assert body.receiver.missing({"encoder": 4}) == {"encoder": 3}


def test_a_bad_answer_of_the_controller_is_counted_and_said(body: Body, caplog: pytest.LogCaptureFixture) -> None:
    body.receiver.take(Message("snapshot", "controller", "c"))
    assert body.receiver.wire_errors == 1
    assert "refused" in caplog.text
