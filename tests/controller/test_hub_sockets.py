"""The hub's sockets on the loopback interface: forwarders, parameter store, router."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from checkpointing import checkpointing

from ami_controller.cli.client import Client, CommandFailedError
from ami_controller.coordinator import Coordinator
from ami_controller.forwarders import make_forwarders
from ami_controller.hub import Router
from ami_controller.lifecycle import Lifecycle
from ami_controller.parameter_store import ParameterStore
from ami_controller.registry import Registry
from ami_controller.tracker import Tracker
from ami_shared import limits, wire
from ami_shared.bus import PARAMETERS, HubAddress, Port, SocketOptions, make_socket
from ami_shared.errors import ConfigurationError, DeadlineError, NoControllerError
from ami_shared.links import port_statistics
from ami_shared.membership import Identity
from ami_shared.snapshots import Snapshot, topic
from ami_shared.wire import Message

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]


def snapshot(version: int, model: str = "image_encoder", size: int = 8) -> Message:
    arrays = {"weight": np.full(size, version, np.float32)}
    return Snapshot(model, version, 1.0, arrays).to_message("image_vae", "1")


@pytest.fixture
def forwarders(hub: HubAddress) -> Iterator[None]:
    made = make_forwarders(hub)
    for forwarder in made:
        forwarder.start()
    yield
    for forwarder in made:
        forwarder.close()
        forwarder.join(30.0)
        assert not forwarder.is_alive()


@pytest.fixture
def publisher(context: Context, hub: HubAddress, forwarders: None) -> zmq.Socket[bytes]:
    return make_socket(context, zmq.PUB, connect=hub.endpoint(Port.PARAMETERS_IN))


@pytest.fixture
def store(context: Context, hub: HubAddress, forwarders: None) -> Iterator[ParameterStore]:
    made = ParameterStore(context, hub)
    made.start()
    yield made
    made.close()
    made.join(30.0)
    assert not made.is_alive()


def publish_until(publisher: zmq.Socket[bytes], frames: Any, condition: Callable[[], Any], poll_for: PollFor) -> None:
    """A publisher drops what nobody has subscribed to yet: repeat until it has arrived."""

    def attempt() -> Any:
        publisher.send_multipart(frames)
        return condition()

    poll_for(attempt)


def test_what_a_body_publishes_reaches_every_subscriber_of_its_topic(
    context: Context, hub: HubAddress, forwarders: None, poll_for: PollFor
) -> None:
    body = make_socket(context, zmq.PUB, connect=hub.endpoint(Port.EXPERIENCE_IN))
    options = SocketOptions(subscriptions=(b"experience/",))
    trainers = [make_socket(context, zmq.SUB, connect=hub.endpoint(Port.EXPERIENCE_OUT), options=options) for _ in "ab"]
    body_sends = [b"experience/body", b"header", b"buffer"]
    publish_until(body, body_sends, lambda: all(trainer.poll(0) for trainer in trainers), poll_for)
    for trainer in trainers:
        assert trainer.recv_multipart() == body_sends


def test_the_two_streams_do_not_mix(
    context: Context,
    hub: HubAddress,
    forwarders: None,
    publisher: zmq.Socket[bytes],
    store: ParameterStore,
    poll_for: PollFor,
) -> None:
    everything = SocketOptions(subscriptions=(b"",))
    trainer = make_socket(context, zmq.SUB, connect=hub.endpoint(Port.EXPERIENCE_OUT), options=everything)
    body = make_socket(context, zmq.PUB, connect=hub.endpoint(Port.EXPERIENCE_IN))
    publish_until(body, [b"experience/body", b"header"], lambda: trainer.poll(0), poll_for)
    publish_until(publisher, wire.encode(snapshot(1)), store.versions, poll_for)
    while trainer.poll(50):
        assert trainer.recv_multipart()[0] == b"experience/body"


def test_a_taken_port_is_a_configuration_error_and_leaves_nothing_bound(context: Context, hub: HubAddress) -> None:
    make_socket(context, zmq.PULL, bind=hub.endpoint(Port.PARAMETERS_OUT))
    with pytest.raises(ConfigurationError, match="taken"):
        make_forwarders(hub)
    for port in (Port.EXPERIENCE_IN, Port.EXPERIENCE_OUT, Port.PARAMETERS_IN):
        make_socket(context, zmq.PULL, bind=hub.endpoint(port))


def test_the_store_keeps_the_newest_of_each_model(
    publisher: zmq.Socket[bytes], store: ParameterStore, poll_for: PollFor
) -> None:
    publish_until(publisher, wire.encode(snapshot(4)), store.versions, poll_for)
    publisher.send_multipart(wire.encode(snapshot(3)))
    publish_until(publisher, wire.encode(snapshot(1, model="other")), lambda: len(store.versions()) == 2, poll_for)
    assert store.versions() == {"image_encoder": 4, "other": 1}
    message = store.newer_than("image_encoder", 3)
    assert message is not None
    assert Snapshot.from_message(message).arrays["weight"].tolist() == [4.0] * 8
    assert store.newer_than("image_encoder", 4) is None
    assert store.newer_than("unknown", 0) is None


def test_a_trainer_that_comes_later_than_many_subscriptions_reaches_all_of_them(
    context: Context, hub: HubAddress, forwarders: None, poll_for: PollFor
) -> None:
    models = [f"model{n}" for n in range(20)]  # more than the queues of this stream hold
    options = SocketOptions(PARAMETERS.queue, PARAMETERS.max_frame_bytes, b"", tuple(map(topic, models)))
    subscriber = make_socket(context, zmq.SUB, connect=hub.endpoint(Port.PARAMETERS_OUT), options=options)
    earlier = make_socket(context, zmq.PUB, connect=hub.endpoint(Port.PARAMETERS_IN), options=PARAMETERS)

    def is_heard(model: str) -> bool:
        earlier.send_multipart(wire.encode(snapshot(1, model)))
        return bool(subscriber.poll(50))

    poll_for(lambda: is_heard(models[-1]))  # so all subscriptions are at the hub
    while subscriber.poll(200):
        subscriber.recv_multipart()
    publisher = make_socket(context, zmq.PUB, connect=hub.endpoint(Port.PARAMETERS_IN), options=PARAMETERS)
    heard: set[str] = set()

    def attempt() -> bool:
        for model in set(models) - heard:
            publisher.send_multipart(wire.encode(snapshot(1, model)))
            if subscriber.poll(50):
                heard.add(Snapshot.from_message(wire.decode(subscriber.recv_multipart())).model)
        return len(heard) == len(models)

    poll_for(attempt)


def test_junk_on_the_parameter_stream_is_counted_and_never_kept(
    publisher: zmq.Socket[bytes], store: ParameterStore, poll_for: PollFor
) -> None:
    publish_until(publisher, wire.encode(snapshot(1)), store.versions, poll_for)
    torn = [bytearray(frame) for frame in wire.encode(snapshot(9))]
    torn[1][-1] ^= 1
    about = topic("image_encoder")
    records = wire.encode(Message("records", "b", "1", topic=about))
    junk = ([about], [about, b"\xc1"], [about, b"\x80", b"y"], torn, records, [b"notices/x/", b"\xc1"])
    for frames in junk:  # one by one: this stream's queues hold but two
        before = store.statistics()["snapshots_refused"]
        publisher.send_multipart(frames)
        poll_for(lambda n=before: store.statistics()["snapshots_refused"] == n + 1)
    told = store.statistics()
    assert told["snapshots_refused"] >= len(junk)
    assert (told["snapshots_from_memory"], told["snapshots_passed_over"]) == (0, 0)
    assert store.versions() == {"image_encoder": 1}


def test_answers_that_a_peer_does_not_take_are_counted_and_hold_up_nobody(context: Context, hub: HubAddress) -> None:
    router = Router(context, hub)
    sleeper = context.socket(zmq.DEALER)
    sleeper.rcvhwm, sleeper.routing_id = 1, b"sleeper"  # what it does not receive stays with the router
    sleeper.connect(hub.endpoint(Port.CONTROL))
    sleeper.send(b"")
    assert router._socket.poll(30_000)
    router._socket.recv_multipart()
    answers = 0
    while not router.statistics()["answers_dropped"]:
        router._send([(b"sleeper", Message("status", "ami", "1", {"pad": "x" * 20_000}))], None)
        answers += 1
        assert answers < 5_000, "they pile up"
    assert answers > 100, "some do fit"
    router.close()


class Served:
    """A router with its coordinator, served by a thread as the controller's main loop does it."""

    def __init__(self, context: Context, hub: HubAddress, store: ParameterStore, run_dir: Path) -> None:
        self.router = Router(context, hub)
        self.registry = Registry({})
        self.coordinator = Coordinator(
            self.registry,
            Lifecycle(),
            store,
            Tracker(run_dir, None, 1.0),
            checkpointing(run_dir, self.registry),
            {},
            self.status,
            lambda: None,
        )
        self._ending = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def status(self, now: float) -> dict[str, Any]:
        return {"system": "running", "wire_errors": self.router.malformed.count, "ports": self.ports()}

    def ports(self) -> dict[str, dict[str, int]]:
        return port_statistics({"control": self.router.links})

    def _serve(self) -> None:
        while not self._ending:
            self.router.serve_once(self.coordinator)

    def close(self) -> None:
        self._ending = True
        self.router.wake()
        self._thread.join()
        self.router.close()


@pytest.fixture
def served(context: Context, hub: HubAddress, store: ParameterStore, tmp_path: Path) -> Iterator[Served]:
    made = Served(context, hub, store, tmp_path)
    yield made
    made.close()


class Service:
    """A member's socket."""

    def __init__(self, context: Context, hub: HubAddress, name: str, incarnation: str = "1") -> None:
        self.identity = Identity(name, "body", {}, incarnation)
        options = SocketOptions(routing_id=self.identity.routing_id)
        self.socket = make_socket(context, zmq.DEALER, connect=hub.endpoint(Port.CONTROL), options=options)

    def asks(self, kind: str, **fields: Any) -> Message:
        self.says(kind, **fields)
        return self.hears()

    def says(self, kind: str, **fields: Any) -> None:
        self.socket.send_multipart(wire.encode(self.identity.message(kind, fields)))

    def hears(self) -> Message:
        assert self.socket.poll(30_000)
        return wire.decode(self.socket.recv_multipart())

    def joins(self) -> Message:
        report = {"state": "starting", "epoch": -1, "statistics": {}}
        return self.asks("join", role="body", host="here", pid=1, agreement={}, **report)

    def reports(self, state: str, epoch: int) -> None:
        self.says("heartbeat", state=state, epoch=epoch, statistics={})


def test_a_late_joiner_has_the_newest_parameters_within_one_request(
    context: Context,
    hub: HubAddress,
    served: Served,
    publisher: zmq.Socket[bytes],
    store: ParameterStore,
    poll_for: PollFor,
) -> None:
    for version in (1, 2):
        frames = wire.encode(snapshot(version, size=100_000))
        publish_until(publisher, frames, lambda v=version: store.versions().get("image_encoder") == v, poll_for)
    body = Service(context, hub, "body")
    assert body.joins().fields["versions"] == {"image_encoder": 2}
    answer = body.asks("get_parameters", model="image_encoder", newer_than=0)
    assert Snapshot.from_message(answer).version == 2
    assert Snapshot.from_message(answer).arrays["weight"].shape == (100_000,)


def test_junk_on_the_control_port_is_counted_and_harms_nobody(
    context: Context, hub: HubAddress, served: Served, poll_for: PollFor
) -> None:
    stranger = make_socket(context, zmq.DEALER, connect=hub.endpoint(Port.CONTROL))
    deep = b"\x81\xa1v" + b"\x91" * 1_000 + b"\x90"
    junk = ([b""], [b"", b"\xc1"], [b"", deep], [b"x"] * 50, wire.encode(Message("nope", "x", "1")),
            wire.encode(Message("join", "body", "1")), wire.encode(Message("heartbeat", "body", "1")))  # fmt: skip
    for frames in junk:
        stranger.send_multipart(frames)
    poll_for(lambda: served.router.malformed.count == len(junk) - 1)  # the heartbeat is only asked to join
    assert Service(context, hub, "body").joins().kind == "joined"


def test_strangers_that_never_shake_hands_are_counted(hub: HubAddress, served: Served, poll_for: PollFor) -> None:
    import socket

    with socket.create_connection((hub.host, hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        poll_for(lambda: served.ports()["control"]["failed"] == 1)
    with Client(hub) as client:  # its own connection counts as failed while it shakes hands
        poll_for(lambda: client.status(timeout_s=30.0)["ports"]["control"]["failed"] == 1)
    poll_for(lambda: served.ports()["control"]["made"] >= 1)


def test_a_name_is_free_at_once_when_its_holder_s_socket_is_gone(
    context: Context, hub: HubAddress, served: Served, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SERVICE_TIMEOUT", 600.0)  # after which it would be free anyway
    first, second = Service(context, hub, "body", "1"), Service(context, hub, "body", "2")
    assert first.joins().kind == "joined"
    assert second.joins().kind == "refused"
    first.hears()  # the probe
    first.socket.close()
    poll_for(lambda: second.joins().kind == "joined", timeout_s=30.0)


def test_an_operator_s_pause_is_answered_when_the_body_has_confirmed(
    context: Context, hub: HubAddress, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SERVICE_TIMEOUT", 600.0)  # this body sends no heartbeats
    body = Service(context, hub, "body")
    body.joins()

    def confirm() -> None:
        wish = body.hears()
        body.reports("paused", wish.fields["desired"]["epoch"])

    confirming = threading.Thread(target=confirm)
    confirming.start()
    with Client(hub) as client:
        outcome = client.command("pause", 30.0)
    confirming.join(30.0)
    assert list(outcome["took_s"]) == ["body"]
    assert outcome["gone"] == []


def test_an_operator_is_told_who_did_not_confirm(
    context: Context, hub: HubAddress, served: Served, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SERVICE_TIMEOUT", 600.0)
    Service(context, hub, "body").joins()

    def told() -> str:
        with Client(hub) as client, pytest.raises((DeadlineError, NoControllerError)) as caught:
            client.command("pause", 0.3)
        return str(caught.value)

    poll_for(lambda: told() == "pause: no confirmation within 0.3 s from body", timeout_s=30.0)


def test_where_nobody_answers_the_error_says_what_to_do(hub: HubAddress) -> None:
    told = rf"no controller answers at {hub}.*ami up.*AMI_HUB"
    with Client(hub) as client, pytest.raises(NoControllerError, match=told):
        client.status(timeout_s=0.1)


def test_an_answer_to_an_earlier_question_is_not_taken_for_the_present_one(context: Context, hub: HubAddress) -> None:
    router = make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL))

    def answer_late() -> None:
        peer, *_ = router.recv_multipart()
        router.recv_multipart()
        for request, system in ((1, "old"), (2, "new")):
            fields = {"request": request, "status": {"system": system}}
            router.send_multipart([peer, *wire.encode(Message("result", "controller", "c", fields))])

    answering = threading.Thread(target=answer_late)
    answering.start()
    with Client(hub) as client:
        with pytest.raises(NoControllerError):
            client.status(timeout_s=0.1)
        assert client.status(timeout_s=30.0)["system"] == "new"
    answering.join(30.0)


def test_something_else_at_the_hub_s_address_is_told_from_a_controller(context: Context, hub: HubAddress) -> None:
    router = make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL))

    def answer() -> None:
        peer, *_ = router.recv_multipart()
        router.send_multipart([peer, b"hello"])

    answering = threading.Thread(target=answer)
    answering.start()
    with Client(hub) as client, pytest.raises(CommandFailedError, match="not an AMI controller"):
        client.status(timeout_s=30.0)
    answering.join(30.0)
