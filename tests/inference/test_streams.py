"""The body's two streams with real sockets: records out, snapshots in."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from torch import nn

from ami_inference.batching import Batcher
from ami_inference.experience import ExperienceSender
from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, SocketOptions, make_socket
from ami_shared.experience import EXTENT, FETCHED, PLACES, Extent, Fetch, Fetched, Places, fetched_topic
from ami_shared.models.receiver import ParameterReceiver
from ami_shared.models.replicas import Replicas
from ami_shared.records import MESSAGE_TYPE as RECORDS
from ami_shared.records import Record, RecordBatch
from ami_shared.settled import Settled
from ami_shared.shared_ring import RingReader
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message
from capabilities import sharing_memory
from subscribing import wait_subscribed

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]
PATIENCE_MS = 30_000


def record(sequence: int) -> Record:
    return Record(0, sequence, time.time(), 0.0, {"m": 1}, {"n": np.array(sequence)})


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BATCH_RECORDS", 64)


@pytest.fixture
def trainer(context: Context, hub: HubAddress) -> zmq.Socket[bytes]:
    """The stream's other end: it stands where the hub's forwarder would be."""
    options = SocketOptions(subscriptions=(b"experience/",))
    return make_socket(context, zmq.SUB, bind=hub.endpoint(Port.EXPERIENCE_IN), options=options)


def connected(context: Context, hub: HubAddress, trainer: zmq.Socket[bytes]) -> ExperienceSender:
    """Return a sender that the trainer has subscribed to."""
    made = ExperienceSender(context, hub, "body", "inc", 1 << 20)
    wait_subscribed(trainer, made._socket)
    return made


@pytest.fixture
def sender(context: Context, hub: HubAddress, trainer: zmq.Socket[bytes]) -> Iterator[ExperienceSender]:
    made = connected(context, hub, trainer)
    yield made
    if made.is_alive():
        made.close()


def received(trainer: zmq.Socket[bytes]) -> RecordBatch:
    assert trainer.poll(PATIENCE_MS), "no batch came"
    batch = RecordBatch.from_message(wire.decode(trainer.recv_multipart()))
    numbers = batch.data["n"].tolist()
    assert numbers == list(range(batch.first_sequence, batch.first_sequence + len(batch))), "labelled as they are"
    return batch


def received_all(trainer: zmq.Socket[bytes], records: int) -> list[RecordBatch]:
    """Return batches of so many records, behind which nothing follows."""
    batches: list[RecordBatch] = []
    while sum(map(len, batches)) < records:
        batches.append(received(trainer))
    assert not trainer.poll(200), "one more came"
    return batches


def test_records_leave_in_full_batches(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    for n in range(2 * limits.BATCH_RECORDS):
        sender.put(record(n))
    sender.start()
    batches = [received(trainer), received(trainer)]
    assert [(b.first_sequence, len(b)) for b in batches] == [(0, 64), (64, 64)]
    assert (batches[0].body, batches[0].incarnation) == ("body", "inc")
    sender.close()
    assert sender.published == 128
    assert sender.bytes_sent > 0


def test_a_single_record_does_not_wait_for_others(
    sender: ExperienceSender, trainer: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXTENT_INTERVAL", 60.0)  # at which it would be sent as well
    sender.start()
    sender.put(record(0))
    assert len(received(trainer)) == 1


def test_what_is_queued_at_the_end_is_sent(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    for n in range(66):
        sender.put(record(n))
    sender.start()
    sender.close()
    assert not sender.is_alive()
    assert [len(received(trainer)) for _ in range(2)] == [64, 2]


def test_a_full_queue_drops_the_oldest_counts_them_and_never_blocks(
    sender: ExperienceSender, trainer: zmq.Socket[bytes]
) -> None:
    for n in range(limits.UNSENT_RECORDS + 5):
        sender.put(record(n))
    assert sender.overflowed == 5
    sender.start()
    assert received(trainer).first_sequence == 5


def test_of_wishes_that_wait_the_oldest_give_way_and_are_counted(sender: ExperienceSender) -> None:
    for n in range(limits.UNANSWERED_FETCHES + 3):
        sender.fetch(Fetch("ppo", "body", "inc", (n, n + 1)).to_message("mine"))
    assert sender.statistics()["wishes_dropped"] == 3
    assert sender._asked[0].range == (3, 4)


@pytest.fixture
def stuck(context: Context, hub: HubAddress) -> zmq.Socket[bytes]:
    """The stream's other end, with so little room that a stream stands still while nobody reads."""
    made = context.socket(zmq.SUB)
    made.linger, made.rcvhwm = 0, 1
    made.setsockopt(zmq.RCVBUF, 4_096)
    made.subscribe(b"experience/")
    made.bind(hub.endpoint(Port.EXPERIENCE_IN))
    return made


def large_record(sequence: int) -> Record:
    return Record(0, sequence, time.time(), 0.0, {"m": 1}, {"n": np.full(500, sequence)})


def test_what_stands_still_on_its_way_is_not_overwritten(
    context: Context, hub: HubAddress, stuck: zmq.Socket[bytes], poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SENT_IN_PLACE_BYTES", 4_096)
    sender = connected(context, hub, stuck)
    sender._socket.copy_threshold = 0  # below which pyzmq copies all the same
    sender.start()
    for n in range(2_000):  # eight times the ring
        poll_for(lambda: sender.unsent < 500)
        sender.put(large_record(n))
    poll_for(lambda: sender.published == 2_000)
    ring_stood_at = sender._ring.end
    taken = 0
    while stuck.poll(500):
        batch = RecordBatch.from_message(wire.decode(stuck.recv_multipart()))
        rows = batch.data["n"]
        assert (rows == np.arange(batch.first_sequence, batch.end)[:, None]).all(), "as it was made"
        taken += batch.nbytes
    assert taken > 1 << 20, "more than the ring can hold was on its way"
    for n in range(2_000, 2_064):
        sender.put(large_record(n))
    poll_for(lambda: sender._ring.end > ring_stood_at)
    sender.close()


def test_what_has_been_sent_is_not_remembered_behind_what_stands_still(sender: ExperienceSender) -> None:
    still = SimpleNamespace(done=False)
    for n in range(100):
        sender._sending += [(n, still if n == 0 else SimpleNamespace(done=True))]  # type: ignore[list-item]
        sender._may_write()
    assert [tracker for _, tracker in sender._sending] == [still]


def test_a_batch_never_spans_records_that_were_dropped(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    for n in (0, 1, 2, 7, 8, 20):
        sender.put(record(n))
    sender.start()
    sender.close()
    batches = [received(trainer) for _ in range(3)]
    assert [(b.first_sequence, len(b)) for b in batches] == [(0, 3), (7, 2), (20, 1)]


@pytest.mark.parametrize(
    "odd",
    [
        [1, 2],
        nn.Parameter(torch.zeros(())),
        memoryview(b"bytes"),
        np.array(["a word"]),
        np.array([None]),
        np.zeros((1,) * 30),
        np.zeros(9_000),
    ],
    ids=["a list", "a tensor", "bytes", "words", "objects", "dimensions", "too large"],
)
def test_a_record_that_no_wire_takes_is_counted_and_said_and_life_goes_on(
    sender: ExperienceSender,
    trainer: zmq.Socket[bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    odd: Any,
) -> None:
    monkeypatch.setattr(limits, "MAX_EXPERIENCE_FRAME_BYTES", 70_000)
    for n in range(10):
        sender.put(record(n) if n not in (5, 8) else record(n)._replace(data={"n": np.array(n), "x": odd}))
    sender.start()
    sender.close()
    got = [n for batch in received_all(trainer, 8) for n in range(batch.first_sequence, batch.end)]
    assert got == [0, 1, 2, 3, 4, 6, 7, 9]
    assert sender.statistics()["unsendable"] == 2
    assert [line.message for line in caplog.records if "cannot be sent" in line.message] == [caplog.records[0].message]
    assert "record 5 of body cannot be sent" in caplog.records[0].message


def test_records_whose_form_changes_are_sent_as_they_are(sender: ExperienceSender, trainer: zmq.Socket[bytes]) -> None:
    forms = [np.zeros(3, np.float32), np.zeros(3, np.float64), np.zeros(4, np.float32), np.zeros((2, 2), np.uint8)]
    for n in range(8):
        sender.put(record(n)._replace(data={"n": np.array(n), "x": forms[n // 2]}))
    sender.put(record(8))
    sender.start()
    sender.close()
    seen = []
    for batch in received_all(trainer, 9):
        seen += [(batch.data["x"].dtype, batch.data["x"].shape[1:]) if "x" in batch.data else None] * len(batch)
    assert seen == [(forms[n // 2].dtype, forms[n // 2].shape) for n in range(8)] + [None]
    assert sender.unsendable == 0


def test_without_a_hub_nothing_blocks(context: Context, hub: HubAddress) -> None:
    sender = ExperienceSender(context, hub, "body", "inc", 1 << 20)
    sender.start()
    begin = time.monotonic()
    for n in range(3_000):
        sender.put(record(n))
    assert time.monotonic() - begin < 30.0
    sender.close()
    assert not sender.is_alive()


def labels(trainer: zmq.Socket[bytes], count: int) -> list[tuple[int, int]]:
    batches = [received(trainer) for _ in range(count)]
    return [(batch.first_sequence, len(batch)) for batch in batches]


def test_a_flush_sends_what_is_queued_without_waiting_for_its_age(
    sender: ExperienceSender, trainer: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch, poll_for: PollFor
) -> None:
    monkeypatch.setattr(limits, "EXTENT_INTERVAL", 60.0)
    monkeypatch.setattr(sender, "_batcher", Batcher(limits.BATCH_RECORDS, 60.0, 1 << 30, lambda record: 1))
    sender.start()
    for n in range(66):
        sender.put(record(n))
    assert labels(trainer, 1) == [(0, 64)]
    assert not trainer.poll(100), "the rest waits"
    sender.flush()
    assert labels(trainer, 1) == [(64, 2)]
    sender.flush()
    poll_for(lambda: not sender._flushing)
    assert not trainer.poll(100), "nothing is left"
    sender.put(record(66))
    assert not trainer.poll(100), "one flush is no promise for what comes later"


class Asking:
    """A trainer that fetches: it hears its own topic and the extents only."""

    def __init__(self, context: Context, hub: HubAddress) -> None:
        options = SocketOptions(subscriptions=(fetched_topic("ppo"), b"extent/"))
        self.socket = make_socket(context, zmq.SUB, bind=hub.endpoint(Port.EXPERIENCE_IN), options=options)
        self.sender = connected(context, hub, self.socket)

    def ask(self, first: int, end: int, incarnation: str = "inc") -> None:
        self.sender.fetch(Fetch("ppo", "body", incarnation, (first, end)).to_message("mine"))

    def next(self, *, extents: bool = False) -> Message:
        deadline = time.monotonic() + PATIENCE_MS / 1_000
        while time.monotonic() < deadline and self.socket.poll(PATIENCE_MS):
            message = wire.decode(self.socket.recv_multipart())
            if (message.kind == EXTENT) == extents:
                return message
        raise AssertionError("nothing came")

    def answer(self) -> tuple[list[tuple[int, int]], Fetched]:
        batches = []
        while (message := self.next()).kind != FETCHED:
            batch = RecordBatch.from_message(message)
            assert batch.data["n"].tolist() == list(range(batch.first_sequence, batch.end))
            batches.append((batch.first_sequence, batch.end))
        return batches, Fetched.from_message(message)


@pytest.fixture
def asking(context: Context, hub: HubAddress) -> Iterator[Asking]:
    """A fetching trainer, and a body that has sent 72 records."""
    made = Asking(context, hub)
    for n in range(72):
        made.sender.put(record(n))
    made.sender.flush()
    made.sender.start()
    yield made
    made.sender.close()


def test_what_is_missing_is_fetched_from_the_ring(asking: Asking, poll_for: PollFor) -> None:
    poll_for(lambda: asking.sender.published == 72)
    asking.ask(20, 72)
    assert asking.answer() == ([(0, 64), (64, 72)], Fetched("body", "inc", (20, 72)))
    asking.ask(0, 10)
    assert asking.answer() == ([(0, 64)], Fetched("body", "inc", (0, 10)))
    assert asking.sender.statistics()["resent"] == 136


def test_a_large_answer_comes_in_bounded_pieces(
    asking: Asking, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    poll_for(lambda: asking.sender.published == 72)
    monkeypatch.setattr(limits, "FETCH_BATCHES", 1)
    asking.ask(0, 72)
    assert asking.answer() == ([(0, 64)], Fetched("body", "inc", (0, 64)))


def test_what_the_ring_lost_and_what_was_never_sent_is_told(
    context: Context, hub: HubAddress, monkeypatch: pytest.MonkeyPatch, poll_for: PollFor
) -> None:
    made = Asking(context, hub)
    for n in (0, 1, 5, 6):  # the queue overflowed between
        made.sender.put(record(n))
    made.sender.flush()
    made.sender.start()
    poll_for(lambda: made.sender.published == 7)
    made.ask(0, 7)
    assert made.answer() == ([(0, 2), (5, 7)], Fetched("body", "inc", (0, 7), ((2, 5),)))
    made.sender.close()


def test_records_that_cannot_be_sent_cost_the_ring_but_spoil_nothing(
    context: Context, hub: HubAddress, poll_for: PollFor
) -> None:
    """Room is taken for their first arrays before the last one is refused."""
    made = Asking(context, hub)
    frames = [np.full(21_000, n, np.uint8) for n in range(60)]
    for n, frame in enumerate(frames):
        odd = {"odd": np.array([None])} if n >= 30 else {}
        made.sender.put(record(n)._replace(data={"n": np.array(n), "frame": frame} | odd))
    made.sender.flush()
    made.sender.start()
    poll_for(lambda: made.sender.unsendable == 30)
    assert Extent.from_message(made.next(extents=True)).range[1] <= 60
    poll_for(lambda: Extent.from_message(made.next(extents=True)).range[1] == 60)
    reached, gone = 0, 0
    while reached < 60:
        made.ask(reached, 60)
        while (message := made.next()).kind != FETCHED:
            batch = RecordBatch.from_message(message)
            for number, frame in zip(batch.data["n"], batch.data["frame"], strict=True):
                assert set(frame) == {number}
        ending = Fetched.from_message(message)
        assert ending.range[1] > reached
        reached = ending.range[1]
        gone += sum(end - first for first, end in ending.gone)
    assert gone >= 30
    made.sender.close()


def test_the_more_ask_at_once_the_less_each_is_sent_at_once(
    context: Context, hub: HubAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FETCH_BYTES", 6_000)
    made = Asking(context, hub)
    for n in range(72):
        made.sender.put(record(n))
    made.sender.flush()
    made.ask(0, 72)
    made.ask(0, 72)
    made.sender.start()
    assert made.answer() == ([(0, 64)], Fetched("body", "inc", (0, 64)))
    assert made.answer() == ([(0, 64), (64, 72)], Fetched("body", "inc", (0, 72)))
    made.sender.close()


def test_what_left_the_ring_is_told_before_the_rest_is_sent(
    context: Context, hub: HubAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXTENT_INTERVAL", 60.0)
    made = Asking(context, hub)
    for n in (5, 6):  # those before have overflowed
        made.sender.put(record(n))
    made.sender.flush()
    made.sender.start()
    made.next(extents=True)
    made.ask(0, 7)
    kinds = [wire.decode(made.socket.recv_multipart()).kind for _ in range(3) if made.socket.poll(PATIENCE_MS)]
    assert kinds == [EXTENT, RECORDS, FETCHED]
    made.sender.close()


def test_a_wish_for_another_life_is_left_unanswered(asking: Asking, poll_for: PollFor) -> None:
    poll_for(lambda: asking.sender.published == 72)
    asking.ask(0, 72, incarnation="former")
    asking.ask(64, 72)
    assert asking.answer()[0] == [(64, 72)]


def test_a_life_tells_of_itself_before_its_first_record_and_one_that_goes_on_does_not(
    context: Context, hub: HubAddress, trainer: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.subscribe(b"extent/")
    monkeypatch.setattr(limits, "EXTENT_INTERVAL", 3_600.0)  # but for the first and the last
    fresh = connected(context, hub, trainer)
    fresh.start()
    fresh.flush()
    assert trainer.poll(PATIENCE_MS)
    assert Extent.from_message(wire.decode(trainer.recv_multipart())) == Extent("body", "inc", (0, 0))
    fresh.close()
    assert trainer.poll(PATIENCE_MS), "a last word"
    assert Extent.from_message(wire.decode(trainer.recv_multipart())) == Extent("body", "inc", (0, 0))
    resumed = connected(context, hub, trainer)
    resumed.go_on_as("former", 500)
    resumed.start()
    resumed.put(record(500))
    assert trainer.poll(PATIENCE_MS)
    heard = [wire.decode(trainer.recv_multipart()).kind]
    while EXTENT not in heard and trainer.poll(PATIENCE_MS):
        heard.append(wire.decode(trainer.recv_multipart()).kind)
    assert heard == [RECORDS, EXTENT], "an empty extent would tell those who come new that 500 records are gone"
    resumed.close()


@sharing_memory
def test_a_full_batch_has_its_place_in_a_small_ring_too(
    context: Context, hub: HubAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BATCH_RECORDS", 256)
    sender = ExperienceSender(context, hub, "body", "inc", 32_000_000)
    for n in range(300):
        sender.put(record(n)._replace(data={"observation": np.zeros(25_000, np.uint8)}))
    sender._drain()
    batches = list(sender._retained._batches)
    assert len(batches) > 1
    assert all(batch.place for batch in batches)


def test_the_extent_is_told_again_and_again(asking: Asking) -> None:
    told = [Extent.from_message(asking.next(extents=True)) for _ in range(2)]
    assert told[-1] == Extent("body", "inc", (0, 72))


def places_in(message: Message) -> list[RecordBatch]:
    """Return the batches that a message tells of, as a process of the same host finds them."""
    places = Places.from_message(message)
    ring = RingReader.open(places.memory)
    assert ring is not None
    frames = [ring.read(place.spans) for place in places.batches]
    return [RecordBatch.from_message(wire.decode([b"", *found])) for found in frames if found]


@sharing_memory
def test_those_who_ask_for_places_are_told_and_no_bytes_are_sent_that_nobody_wants(
    context: Context, hub: HubAddress, poll_for: PollFor
) -> None:
    options = SocketOptions(subscriptions=(b"places/", fetched_topic("ppo")))
    near = make_socket(context, zmq.SUB, bind=hub.endpoint(Port.EXPERIENCE_IN), options=options)
    sender = connected(context, hub, near)
    for n in range(72):
        sender.put(record(n))
    sender.start()
    told: list[RecordBatch] = []
    while sum(map(len, told)) < 72 and near.poll(PATIENCE_MS):
        told += places_in(wire.decode(near.recv_multipart()))
    assert [n for batch in told for n in batch.data["n"].tolist()] == list(range(72))
    sender.fetch(Fetch("ppo", "body", "inc", (64, 72), places=True).to_message("mine"))
    assert near.poll(PATIENCE_MS)
    (batch,) = places_in(wire.decode(near.recv_multipart()))
    assert (batch.first_sequence, batch.end) == (64, 72)
    assert near.poll(PATIENCE_MS)
    assert Fetched.from_message(wire.decode(near.recv_multipart())).range == (64, 72)
    assert sender.bytes_sent < 10_000, "places, not records"
    near.subscribe(b"experience/")
    poll_for(lambda: b"experience/" in sender._subscriptions._prefixes)
    sender.put(record(72))
    assert kinds_heard(near, 2) == [PLACES, RECORDS], "who wants the bytes has them"
    near.unsubscribe(b"places/")
    poll_for(lambda: b"places/" not in sender._subscriptions._prefixes)
    sender.put(record(73))
    assert kinds_heard(near, 1) == [RECORDS], "nobody is told of places who wants none"
    sender.close()


def kinds_heard(trainer: zmq.Socket[bytes], expected: int) -> list[str]:
    """Return the kinds of so many messages, and of those that follow at once."""
    kinds: list[str] = []
    while trainer.poll(PATIENCE_MS if len(kinds) < expected else 500):
        kinds.append(wire.decode(trainer.recv_multipart()).kind)
    return kinds


def test_the_last_word_tells_of_all_records(asking: Asking, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch) -> None:
    asking.next(extents=True)
    monkeypatch.setattr(limits, "EXTENT_INTERVAL", 3_600.0)
    for n in range(72, 80):
        asking.sender.put(record(n))
    asking.sender.close()
    poll_for(lambda: Extent.from_message(asking.next(extents=True)).range == (0, 80))


def test_who_asks_is_answered_while_the_queue_never_empties(asking: Asking, poll_for: PollFor) -> None:
    poll_for(lambda: asking.sender.published == 72)
    numbers, add = itertools.count(72), asking.sender._batcher.add

    def adding_another(waiting: Record, now: float) -> Any:
        asking.sender.put(record(next(numbers)))
        return add(waiting, now)

    asking.sender._batcher.add = adding_another  # type: ignore[method-assign]
    try:
        asking.sender.put(record(next(numbers)))
        asking.ask(0, 8)
        poll_for(lambda: asking.next().kind == FETCHED)
    finally:
        asking.sender._batcher.add = add  # type: ignore[method-assign]


def test_a_batch_too_large_for_the_ring_is_sent_and_retained_all_the_same(asking: Asking, poll_for: PollFor) -> None:
    poll_for(lambda: asking.sender.published == 72)
    large = Record(0, 72, time.time(), 0.0, {}, {"n": np.arange(1 << 17)})
    asking.sender.put(large)
    poll_for(lambda: Extent.from_message(asking.next(extents=True)).range[1] == 73)
    asking.sender.fetch(Fetch("ppo", "body", "inc", (72, 73), places=True).to_message("mine"))
    batch = RecordBatch.from_message(asking.next())
    assert np.array_equal(batch.data["n"][0], large.data["n"])


class Body:
    """Replicas of one model that follow the stream."""

    def __init__(self, context: Context, hub: HubAddress, on_settled: Callable[[Settled], None] | None = None) -> None:
        self.hub_end = make_socket(context, zmq.PUB, bind=hub.endpoint(Port.PARAMETERS_OUT))
        self.replicas = Replicas({"encoder": nn.Linear(3, 2)})
        self.receiver = ParameterReceiver(context, hub, self.replicas, ["encoder"], on_settled)
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
    return Snapshot(model, version, time.time(), arrays).to_message("trainer", "1")


def test_snapshots_of_its_models_reach_the_replicas(body: Body, poll_for: PollFor) -> None:
    def arrives() -> bool:
        body.hub_end.send_multipart(wire.encode(snapshot(9, model="encoder2")))
        body.hub_end.send_multipart(wire.encode(snapshot(2)))
        return body.newest() == 2

    poll_for(arrives)
    poll_for(lambda: body.receiver.received == 1)
    assert body.receiver.statistics()["snapshots_refused"] == 0


def test_snapshots_that_are_torn_or_do_not_fit_are_counted_and_the_stream_goes_on(
    body: Body, poll_for: PollFor
) -> None:
    def arrives() -> bool:
        body.hub_end.send_multipart(wire.encode(snapshot(1)))
        return body.newest() == 1

    poll_for(arrives)
    torn = [bytearray(frame) for frame in wire.encode(snapshot(5))]
    torn[1][-3] ^= 4  # among the small arrays' bytes
    topic = torn[0]
    for frames in (torn, wire.encode(snapshot(6, size=3)), [topic, b"\xc1"], [topic]):
        body.hub_end.send_multipart(frames)
    poll_for(lambda: body.receiver.statistics()["snapshots_refused"] == 4)
    body.hub_end.send_multipart(wire.encode(snapshot(7)))
    poll_for(lambda: body.newest() == 7)
    assert body.replicas.refused == 1


def test_what_was_refused_is_asked_for_again_and_its_answer_used(body: Body, poll_for: PollFor) -> None:
    body.receiver.take(snapshot(3))
    torn = [bytearray(frame) for frame in wire.encode(snapshot(5))]
    torn[1][-3] ^= 4

    def is_refused() -> bool:
        body.hub_end.send_multipart(torn)
        return body.receiver.statistics()["snapshots_refused"] > 0

    poll_for(is_refused)
    now = time.monotonic()
    assert body.receiver.questions({"encoder": 5}, now) == [], "it may be on its way"
    assert body.receiver.questions({"encoder": 5}, now + 60.0) == [{"model": "encoder", "newer_than": 3}]
    body.receiver.take(snapshot(5))
    assert body.newest() == 5
    body.receiver.take(snapshot(4))
    assert body.newest() == 5
    assert body.receiver.statistics()["snapshots_passed_over"] == 1


def test_what_the_controller_has_newer_is_missing(body: Body) -> None:
    assert body.receiver.missing({}) == {}
    assert body.receiver.missing({"encoder": 3, "other": 9}) == {"encoder": 0}
    body.receiver.take(snapshot(3))
    assert body.receiver.missing({"encoder": 3}) == {}
    assert body.receiver.missing({"encoder": 4}) == {"encoder": 3}


def test_the_controller_is_not_asked_for_what_is_on_its_way(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"encoder": 0.0}
    monkeypatch.setattr(body.receiver._feed, "moved_at", moved.__getitem__)
    ask = body.receiver.questions
    assert ask({"encoder": 3}, 100.0) == [{"model": "encoder", "newer_than": 0}], "the first is wanted at once"
    body.receiver.take(snapshot(3))
    for n in range(40):  # a large model, a version a second, each some seconds under way
        moved["encoder"] = 111.0 + n / 2 - 1.0
        if n % 4 == 3:
            body.receiver.take(snapshot(4 + n // 4))
        assert ask({"encoder": 9 + n}, 111.0 + n / 2) == []
    assert ask({"encoder": 99}, 131.5) == []
    assert ask({"encoder": 99}, 133.0) == [{"model": "encoder", "newer_than": 13}], "nothing comes any more"
    assert ask({"encoder": 100}, 138.0) == [], "the answer may be large"


def test_what_never_comes_whole_is_asked_for_however_much_of_it_comes(
    body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    body.receiver.take(snapshot(3))
    asked_at = []
    for n in range(400):  # a line too slow for the stream: its queue drops parts of every version
        now = 100.0 + n / 2
        monkeypatch.setattr(body.receiver._feed, "moved_at", lambda model, now=now: now)
        if body.receiver.questions({"encoder": 4 + n}, now):
            asked_at.append(now - 100.0)
    assert asked_at[0] == pytest.approx(10.0, abs=1.0)
    gaps = np.diff(asked_at)
    assert 3 <= len(gaps) <= 6
    assert (np.diff(gaps) >= 0).all(), "ever less often, while nothing comes of it"


def test_a_bad_answer_of_the_controller_is_counted_and_said(body: Body, caplog: pytest.LogCaptureFixture) -> None:
    body.receiver.take(Message("snapshot", "controller", "c"))
    assert body.receiver.statistics()["snapshots_refused"] == 1
    assert "malformed snapshot dropped (1 so far) from controller" in caplog.text


@pytest.fixture
def notices() -> list[Settled]:
    return []


@pytest.fixture
def waiting_body(context: Context, hub: HubAddress, notices: list[Settled]) -> Iterator[Body]:
    made = Body(context, hub, notices.append)
    yield made
    made.receiver.close()


def tell(body: Body, message: Message) -> None:
    body.hub_end.send_multipart(wire.encode(message))


def test_the_notices_of_all_trainers_are_heard_beside_snapshots(
    waiting_body: Body, notices: list[Settled], poll_for: PollFor
) -> None:
    first, second = Settled("ppo", {"inc": 512}, {"policy": 3}), Settled("vae", {"inc": 500, "other": 7}, {})

    def arrives() -> bool:
        tell(waiting_body, first.to_message("1"))
        return bool(notices)

    poll_for(arrives)
    notices.clear()
    tell(waiting_body, snapshot(4))
    tell(waiting_body, second.to_message("2"))
    poll_for(lambda: second in notices)
    assert waiting_body.newest() == 4
    assert waiting_body.receiver.statistics()["snapshots_refused"] == 0


def test_a_malformed_notice_is_counted_and_the_stream_goes_on(
    waiting_body: Body, notices: list[Settled], poll_for: PollFor
) -> None:
    good = Settled("ppo", {"inc": 512}, {})

    def arrives() -> bool:
        tell(waiting_body, good.to_message("1"))
        return bool(notices)

    poll_for(arrives)
    heard = len(notices)
    for fields in ({}, {"frontiers": {"inc": 1}}, {"frontiers": {"inc": "many"}, "versions": {}}):
        tell(waiting_body, Message("settled", "ppo", "1", fields, topic=b"settled/ppo"))
    poll_for(lambda: waiting_body.receiver.statistics()["snapshots_refused"] == 3)
    tell(waiting_body, good.to_message("1"))
    poll_for(lambda: len(notices) > heard)


def test_who_waits_for_nobody_hears_no_notices(body: Body, poll_for: PollFor) -> None:
    def arrives() -> bool:
        tell(body, Settled("ppo", {}, {}).to_message("1"))
        tell(body, snapshot(1))
        return body.newest() == 1

    poll_for(arrives)
    assert body.receiver.statistics()["snapshots_refused"] == 0
