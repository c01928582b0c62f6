"""Every attack twice: on a hub without keys it works, on one with keys it fails, is counted, and harms nobody else."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from whole_hub import WholeHub

from ami_controller.allowance import Allowance
from ami_controller.cli.client import Client, CommandFailedError
from ami_controller.doorkeeper import LINES_AT_ONCE, Refusals
from ami_controller.key_folder import Listing
from ami_shared import limits, wire
from ami_shared.bus import EXPERIENCE, PARAMETERS, HubAddress, Port, SocketOptions, dial, make_socket
from ami_shared.errors import JoinRefusedError, NoControllerError
from ami_shared.experience import Extent, Place, Places
from ami_shared.keys import Credentials, Door, Pair
from ami_shared.membership import Identity
from ami_shared.records import Record, RecordBatch
from ami_shared.shared_memory import Reference
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Message

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]


@pytest.fixture
def make_hub(hub: HubAddress, tmp_path: Path) -> Iterator[Callable[[bool], WholeHub]]:
    made: list[WholeHub] = []

    def make(keys: bool) -> WholeHub:
        made.append(WholeHub(hub, tmp_path, keys))
        return made[-1]

    yield make
    for whole in made:
        whole.close()


@pytest.fixture(params=[False, True], ids=["without keys", "with keys"])
def either(request: pytest.FixtureRequest, make_hub: Callable[[bool], WholeHub]) -> WholeHub:
    return make_hub(request.param)


@pytest.fixture
def guarded(make_hub: Callable[[bool], WholeHub]) -> WholeHub:
    return make_hub(True)


def records(body: str, number: int = 0) -> list[Any]:
    record = Record(0, number, 1.0, 0.0, {}, {"observation": np.full(3, 7, np.uint8)})
    return wire.encode(RecordBatch.stack(body, "1", [record]).to_message())


def snapshot(model: str, version: int, sender: str) -> list[Any]:
    return wire.encode(Snapshot(model, version, 1.0, {"w": np.full(4, version, np.float32)}).to_message(sender, "1"))


@contextmanager
def hearing(context: Context, hub: HubAddress, port: Port) -> Iterator[list[Message]]:
    """Collect all messages of a stream."""
    heard: list[Message] = []
    ending = threading.Event()
    listener = dial(context, zmq.SUB, hub, port, SocketOptions(100, 1 << 20, subscriptions=(b"",)))

    def listen() -> None:
        while not ending.is_set():
            if listener.poll(20):
                heard.append(wire.decode(listener.recv_multipart()))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield heard
    finally:
        ending.set()
        thread.join()


def send_until(
    publisher: zmq.Socket[bytes], frames: list[Any], condition: Callable[[], Any], poll_for: PollFor
) -> None:
    def attempt() -> Any:
        publisher.send_multipart(frames)
        return condition()

    poll_for(attempt, 30.0)


def knows_why_not(client: Client) -> bool:
    """Whether a client has heard why it gets no connection."""
    client._link.drain()
    return bool(client._link.refusal or client._link.doubt)


def test_no_key(either: WholeHub, poll_for: PollFor) -> None:
    with Client(either.hub) as stranger:
        if not either.security:
            stranger.command("pause", 2.0)
            assert either.lifecycle.desired.paused
            return
        poll_for(lambda: knows_why_not(stranger), 30.0)
        with pytest.raises((JoinRefusedError, NoControllerError), match="--join FILE if the hub has keys"):
            stranger.command("pause", 2.0)
    assert not either.lifecycle.desired.paused
    with Client(either.of("me")) as operator:
        operator.command("pause", 2.0)
    assert either.lifecycle.desired.paused


def test_an_unknown_key_is_told_so_and_said_once_with_its_peer(
    guarded: WholeHub, caplog: pytest.LogCaptureFixture, poll_for: PollFor
) -> None:
    known = guarded.credentials("me")
    stranger = guarded.hub.with_credentials(Credentials(known.hub_public, Pair.new()))
    for _ in range(3):
        with Client(stranger) as client:
            poll_for(lambda client=client: knows_why_not(client), 30.0)
            with pytest.raises(JoinRefusedError, match="does not know this key"):
                client.status(timeout_s=0.5)
    assert guarded.refused("connections") == 3
    said = [record.getMessage() for record in caplog.records if "unknown key" in record.getMessage()]
    assert len(said) == 1
    assert "127.0.0.1" in said[0]
    assert stranger.credentials is not None
    assert stranger.credentials.pair.public.decode() in said[0]
    assert stranger.credentials.pair.secret.decode() not in caplog.text


def test_a_hub_that_is_not_the_key_file_s_is_not_spoken_to(guarded: WholeHub, poll_for: PollFor) -> None:
    own = guarded.credentials("me")
    wrong = guarded.hub.with_credentials(Credentials(Pair.new().public, own.pair))
    with Client(wrong) as client:
        poll_for(lambda: knows_why_not(client), 30.0)
        with pytest.raises(NoControllerError, match="FILE must be that hub's"):
            client.status(timeout_s=0.5)


def test_a_key_at_a_hub_without_keys_is_told_so(make_hub: Callable[[bool], WholeHub], poll_for: PollFor) -> None:
    whole = make_hub(False)
    keyed = whole.hub.with_credentials(Credentials(Pair.new().public, Pair.new()))
    with Client(keyed) as client:
        poll_for(lambda: knows_why_not(client), 30.0)
        # Which of the two depends on whose greeting is read first.
        with pytest.raises((JoinRefusedError, NoControllerError), match="if the hub has keys, and only then"):
            client.status(timeout_s=0.5)


def is_turned_away(client: Client) -> bool:
    try:
        client.status(timeout_s=0.5)
    except (CommandFailedError, JoinRefusedError):
        return True
    except NoControllerError:  # a busy one is slow to answer
        return False
    return False


def numbered(heard: list[Message], number: int) -> list[Message]:
    return [message for message in list(heard) if RecordBatch.from_message(message).first_sequence == number]


def test_a_revoked_key_is_cut_off_on_every_live_connection(
    context: Context, guarded: WholeHub, poll_for: PollFor
) -> None:
    publisher = dial(context, zmq.PUB, guarded.of("twin"), Port.EXPERIENCE_IN, EXPERIENCE)
    with (
        Client(guarded.of("eye")) as revoked,
        Client(guarded.of("me")) as other,
        hearing(context, guarded.of("eye"), Port.EXPERIENCE_OUT) as spied,
        hearing(context, guarded.of("image_vae"), Port.EXPERIENCE_OUT) as heard,
    ):
        revoked.status(timeout_s=30.0)
        send_until(publisher, records("twin"), lambda: heard and spied, poll_for)
        served = [forwarder._out for forwarder in guarded.forwarders]
        guarded.keys.revoke("eye")
        poll_for(lambda: is_turned_away(revoked), 30.0)
        poll_for(lambda: all(each.closed for each in served), 30.0)
        assert other.status(timeout_s=30.0)["system"] == "running"
        send_until(publisher, records("twin", 1), lambda: len(numbered(heard, 1)) > 100, poll_for)
        assert not numbered(spied, 1), "the others were let in again, the revoked one was not"


def test_a_revoked_member_is_told_and_struck(
    context: Context, guarded: WholeHub, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SERVICE_TIMEOUT", 600.0)  # it sends no heartbeats
    identity = Identity("body", "body", {}, "1")
    options = SocketOptions(routing_id=identity.routing_id)
    member = dial(context, zmq.DEALER, guarded.of("body"), Port.CONTROL, options)
    report = {"state": "running", "epoch": 0, "statistics": {}, "role": "body", "host": "h", "pid": 1, "agreement": {}}
    member.send_multipart(wire.encode(identity.message("join", report)))
    poll_for(lambda: "body" in guarded.registry.members)
    guarded.keys.revoke("body")
    poll_for(lambda: "body" not in guarded.registry.members)

    def refusal() -> str | None:
        assert member.poll(30_000)
        message = wire.decode(member.recv_multipart())
        return message.get("reason", str) if message.kind == "refused" else None

    assert "revoked" in poll_for(refusal)


def test_a_file_that_is_no_entry_stops_no_revocation_and_locks_nobody_out(guarded: WholeHub, poll_for: PollFor) -> None:
    assert guarded.security is not None
    allowed = guarded.keys.folder / "allowed"
    (allowed / "me.json").write_text("{")
    (allowed / "copy of eye.json").write_bytes((allowed / "eye.json").read_bytes())
    with Client(guarded.of("eye")) as revoked, Client(guarded.of("me")) as other:
        revoked.status(timeout_s=30.0)
        guarded.keys.revoke("eye")
        poll_for(lambda: is_turned_away(revoked), 30.0)
        assert other.status(timeout_s=30.0)["system"] == "running"
        assert "copy of eye.json is not an entry" in (guarded.security.trouble or "")
        (allowed / "copy of eye.json").unlink()
        guarded.keys.revoke("me")
        poll_for(lambda: is_turned_away(other), 30.0)
    poll_for(lambda: guarded.security is not None and guarded.security.trouble is None, 30.0)


def test_a_list_that_cannot_be_read_stays_as_it_was(guarded: WholeHub, poll_for: PollFor) -> None:
    assert guarded.security is not None
    allowed = guarded.keys.folder / "allowed"
    allowed.rename(allowed.with_name("away"))
    poll_for(lambda: guarded.security is not None and guarded.security.trouble, 30.0)
    assert "stays as it was" in (guarded.security.trouble or "")
    with Client(guarded.of("me")) as operator:
        assert operator.status(timeout_s=30.0)["system"] == "running"
    allowed.with_name("away").rename(allowed)
    poll_for(lambda: guarded.security is not None and guarded.security.trouble is None, 30.0)


def test_a_list_that_is_moved_away_while_it_is_read_stays_as_it_was(
    guarded: WholeHub, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert guarded.security is not None
    allowed, read = guarded.keys.folder / "allowed", guarded.keys.allowed

    def too_late() -> Listing:
        if allowed.exists():
            allowed.rename(allowed.with_name("away"))
        return read()

    poll_for(lambda: guarded.doorkeeper._seen is not None)  # it has read the list once
    monkeypatch.setattr(guarded.keys, "allowed", too_late)
    (allowed / "new.json").write_text("{}")
    poll_for(lambda: guarded.security is not None and guarded.security.trouble, 30.0)
    assert "stays as it was" in (guarded.security.trouble or "")
    with Client(guarded.of("me")) as operator:
        assert operator.status(timeout_s=30.0)["system"] == "running"


def test_refusals_are_logged_also_after_very_many_kinds(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    for n in range(5_000):
        refusals.add("connections", "unknown key", f"key {n}")
    assert len(caplog.messages) == LINES_AT_ONCE, "a flood does not fill the disk"
    now[0] = 60.0
    refusals.add("commands", "not a body", "key of a friend")
    assert "key of a friend: not a body" in caplog.messages[-1]
    assert refusals.count == {"connections": 5_000, "commands": 1}


def test_without_a_doorkeeper_nobody_comes_in(context: Context, guarded: WholeHub) -> None:
    """ZeroMQ's own default is the reverse: a domain that is not enforced lets everybody in."""
    assert guarded.doorkeeper is not None
    assert guarded.security is not None
    guarded.doorkeeper.close()
    guarded.doorkeeper.join(30.0)
    with Client(guarded.of("me")) as operator, pytest.raises(NoControllerError):
        operator.status(timeout_s=0.5)

    unguarded: Context = zmq.Context()
    for enforced, comes_in in ((0, True), (1, False)):
        listener = unguarded.socket(zmq.PULL)
        Door(guarded.security.folder.pair(), "CONTROL").protect(listener)
        listener.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, enforced)
        port = listener.bind_to_random_port("tcp://127.0.0.1")
        credentials = Credentials(guarded.security.folder.pair().public, Pair.new())
        sender = make_socket(context, zmq.PUSH, connect=f"tcp://127.0.0.1:{port}", security=credentials)
        sender.send(b"unknown")
        assert bool(listener.poll(30_000 if comes_in else 500)) == comes_in
        listener.close()
    unguarded.destroy(linger=0)


def test_a_domain_that_the_doorkeeper_does_not_know_is_shut(
    context: Context, guarded: WholeHub, poll_for: PollFor
) -> None:
    assert guarded.security is not None
    listener = guarded._context.socket(zmq.PULL)
    Door(guarded.security.folder.pair(), "CELLAR").protect(listener)
    port = listener.bind_to_random_port("tcp://127.0.0.1")
    sender = make_socket(context, zmq.PUSH, connect=f"tcp://127.0.0.1:{port}", security=guarded.credentials("me"))
    sender.send(b"let me in")
    poll_for(lambda: guarded.refused("connections") == 1, 30.0)
    assert not listener.poll(500)
    listener.close()
    assert guarded.refused("connections") == 1


def test_a_body_publishing_parameters(context: Context, either: WholeHub, poll_for: PollFor) -> None:
    body = dial(context, zmq.PUB, either.of("body"), Port.PARAMETERS_IN, PARAMETERS)
    frames = snapshot("image_encoder", 9, "image_vae")
    if not either.security:
        send_until(body, frames, either.store.versions, poll_for)
        return
    poll_for(lambda: either.refused("connections") >= 1)
    body.send_multipart(frames)
    trainer = dial(context, zmq.PUB, either.of("image_vae"), Port.PARAMETERS_IN, PARAMETERS)
    send_until(trainer, snapshot("image_encoder", 1, "image_vae"), either.store.versions, poll_for)
    assert either.store.versions() == {"image_encoder": 1}


def test_a_trainer_publishing_another_s_model(context: Context, either: WholeHub, poll_for: PollFor) -> None:
    ppo = dial(context, zmq.PUB, either.of("ppo"), Port.PARAMETERS_IN, PARAMETERS)
    forged = [snapshot("image_encoder", 9, "image_vae"), snapshot("image_encoder", 9, "ppo")]
    if not either.security:
        send_until(ppo, forged[0], either.store.versions, poll_for)
        return
    for frames in forged:
        before = either.refused("messages")
        send_until(ppo, frames, lambda n=before: either.refused("messages") > n, poll_for)
    send_until(ppo, snapshot("policy_value", 2, "ppo"), either.store.versions, poll_for)
    assert either.store.versions() == {"policy_value": 2}


def test_a_replayed_older_snapshot_is_not_taken(context: Context, either: WholeHub, poll_for: PollFor) -> None:
    """Wherever it comes from: versions never go back."""
    trainer = dial(context, zmq.PUB, either.of("image_vae"), Port.PARAMETERS_IN, PARAMETERS)
    send_until(trainer, snapshot("image_encoder", 5, "image_vae"), either.store.versions, poll_for)
    with hearing(context, either.of("eye"), Port.PARAMETERS_OUT) as heard:
        replayed = snapshot("image_encoder", 3, "image_vae")
        send_until(trainer, replayed, lambda: any(m.fields.get("version") == 3 for m in heard), poll_for)
    assert either.store.versions() == {"image_encoder": 5}


def test_a_forged_body_name(context: Context, either: WholeHub, poll_for: PollFor) -> None:
    twin = dial(context, zmq.PUB, either.of("twin"), Port.EXPERIENCE_IN, EXPERIENCE)
    extent = wire.encode(Extent("body", "1", (0, 9)).to_message())
    somewhere = Places("body", "1", Reference(1, 3, bytes(16), 0, 64), (Place((0, 9), ((0, 8),)),))
    places = [wire.encode(somewhere.to_message(trainer)) for trainer in (None, "image_vae")]
    own_name_others_topic = [b"experience/body/", *records("twin")[1:]]
    without_slash = [b"experience/twin", *records("twin")[1:]]
    with hearing(context, either.of("image_vae"), Port.EXPERIENCE_OUT) as heard:
        for forged in (records("body"), extent, *places, own_name_others_topic):
            if either.security:
                before = either.refused("messages")
                send_until(twin, forged, lambda n=before: either.refused("messages") > n, poll_for)
            else:
                before = len(heard)
                send_until(twin, forged, lambda n=before: len(heard) > n, poll_for)
        if either.security:
            send_until(twin, records("twin"), lambda: heard, poll_for)
            send_until(twin, without_slash, lambda: any(m.topic == b"experience/twin" for m in heard), poll_for)
            assert {message.sender for message in heard} == {"twin"}


def test_a_thief_of_routing_ids(
    context: Context, either: WholeHub, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ROUTER hands a routing id over to whoever comes with it. So it is not made of what others are told."""
    monkeypatch.setattr(limits, "SERVICE_TIMEOUT", 600.0)  # the body sends no heartbeats
    identity = Identity("body", "body", {}, "1")
    report = {"state": "running", "epoch": 0, "statistics": {}, "role": "body", "host": "h", "pid": 1, "agreement": {}}

    def dialler(name: str, routing_id: bytes) -> zmq.Socket[bytes]:
        options = SocketOptions(routing_id=routing_id)
        return dial(context, zmq.DEALER, either.of(name), Port.CONTROL, options)

    def joined() -> Any:
        return wire.decode(body.recv_multipart()).kind == "joined" if body.poll(30_000) else False

    body = dialler("body", identity.routing_id)
    body.send_multipart(wire.encode(identity.message("join", report)))
    poll_for(joined)
    guesses = [dialler("twin", guess) for guess in (b"body/1", b"body", b"1")]
    for guess in guesses:
        guess.send_multipart(wire.encode(Message("status", "twin", "1", {"request": 1})))
        assert guess.poll(30_000), "it is connected"
        guess.recv_multipart()
    with Client(either.of("me")) as operator:
        operator._send("pause", {"timeout_s": 1.0})
        assert body.poll(30_000)
    assert not any(guess.poll(100) for guess in guesses)


@pytest.mark.parametrize("kind", ["pause", "resume", "shutdown", "save"])
def test_an_observer_commanding(guarded: WholeHub, kind: str) -> None:
    with Client(guarded.of("eye")) as observer:
        assert observer.status(timeout_s=30.0)["system"] == "running"
        with pytest.raises(CommandFailedError, match=f"observer eye may not say '{kind}'"):
            observer.save(None, None) if kind == "save" else observer.command(kind, 1.0)
    assert guarded.refused("commands") == 1
    assert not guarded.lifecycle.desired.stopping


def test_a_body_that_joins_as_another_or_as_a_trainer(context: Context, either: WholeHub, poll_for: PollFor) -> None:
    options = SocketOptions(routing_id=b"a twin")
    twin = dial(context, zmq.DEALER, either.of("twin"), Port.CONTROL, options)
    report = {"state": "running", "epoch": 0, "statistics": {}, "role": "body", "host": "h", "pid": 1, "agreement": {}}
    for name, role in (("body", "body"), ("twin", "trainer")):
        twin.send_multipart(wire.encode(Message("join", name, "1", report | {"role": role})))
    if either.security:
        poll_for(lambda: either.refused("commands") == 2)
        assert not either.registry.members
    else:
        poll_for(lambda: len(either.registry.members) == 2)


def test_a_replayed_command_is_not_carried_out_again(context: Context, either: WholeHub, poll_for: PollFor) -> None:
    """The bytes of a command of a while ago, from one who may command: it says when it was given."""
    operator = dial(context, zmq.DEALER, either.of("me"), Port.CONTROL)
    old = {"request": 1, "timeout_s": 5.0, "given": time.monotonic() - 60.0}
    operator.send_multipart(wire.encode(Message("pause", "operator", "1", old)))
    operator.send_multipart(wire.encode(Message("status", "operator", "1", {"request": 2})))
    assert operator.poll(30_000)
    assert wire.decode(operator.recv_multipart()).fields["request"] == 2
    assert not either.lifecycle.desired.paused


class Wiretap:
    """A proxy that passes one connection on, and keeps a copy of all bytes."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.captured = bytearray()
        self._target = target
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        self._sockets = (near, far)
        threads = [threading.Thread(target=self._pass, args=pair, daemon=True) for pair in ((near, far), (far, near))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        while chunk := source.recv(65_536):
            self.captured += chunk
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._threads[0].join(5.0)
        for used in (*self._sockets, self._listener):
            used.close()


def test_an_eavesdropper_on_the_wire(context: Context, either: WholeHub, poll_for: PollFor) -> None:
    tap = Wiretap((either.hub.host, either.hub.port + Port.EXPERIENCE_IN.value))
    body = make_socket(
        context, zmq.PUB, connect=f"tcp://127.0.0.1:{tap.port}", options=EXPERIENCE,
        security=either.of("twin").credentials,
    )  # fmt: skip
    with hearing(context, either.of("image_vae"), Port.EXPERIENCE_OUT) as heard:
        send_until(body, records("twin"), lambda: heard, poll_for)
    body.close()
    tap.close()
    assert len(tap.captured) > 200
    assert (b"experience/" in tap.captured) == (b"observation" in tap.captured) == (not either.security)


def test_idle_connections_and_half_finished_handshakes_end_and_keep_nobody_out(either: WholeHub) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + (b"CURVE" if either.security else b"NULL").ljust(20, b"\0")
    ports = [either.hub.port + port.value for port in Port]
    with ExitStack() as opened:
        addresses = [(either.hub.host, ports[n % len(ports)]) for n in range(200)]
        idle = [opened.enter_context(socket.create_connection(address)) for address in addresses]
        for half in idle[::2]:
            half.sendall(greeting)
        with Client(either.of("me")) as operator:
            assert operator.status(timeout_s=30.0)["system"] == "running"
        deadline = time.monotonic() + 60.0
        for stranger in idle:
            stranger.settimeout(max(0.1, deadline - time.monotonic()))
            while stranger.recv(4096):
                pass


def test_secrets_appear_nowhere_but_in_their_files(
    guarded: WholeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = [json.loads((tmp_path / f"{name}.json").read_text())["secret"] for name in ("body", "me")]
    secrets.append(json.loads((tmp_path / "keys" / "hub.json").read_text())["secret"])
    shown = repr((guarded.of("me"), guarded.credentials("body"), guarded.security, guarded.keys.pair())) + caplog.text
    others = [path for path in (tmp_path / "keys").rglob("*.json") if path.name != "hub.json"]
    shown += "".join(path.read_text() for path in others)
    assert not [secret for secret in secrets if secret in shown]


def test_a_key_that_floods_is_held_to_its_share(context: Context, guarded: WholeHub, poll_for: PollFor) -> None:
    flood = dial(context, zmq.DEALER, guarded.of("eye"), Port.CONTROL, SocketOptions(queue=100_000))
    question = wire.encode(Message("status", "eye", "1", {"request": 1}))
    guarded.router._allowance = Allowance(per_s=1.0, at_once=100.0)
    for _ in range(1_000):
        flood.send_multipart(question)
        flood.send_multipart([b"", b"\xc1"])  # what cannot be decoded counts, too
    with Client(guarded.of("me")) as operator:
        assert operator.status(timeout_s=30.0)["system"] == "running"
    poll_for(lambda: guarded.refused("commands") > 1_800)


def test_a_key_that_connects_again_and_again_is_put_off(guarded: WholeHub, poll_for: PollFor) -> None:
    assert guarded.doorkeeper is not None
    guarded.doorkeeper._allowance = Allowance(per_s=0.2, at_once=3.0)

    def put_off() -> bool:
        with Client(guarded.of("eye")) as observer:
            assert observer.status(timeout_s=30.0)["system"] == "running", "it is let in some seconds later"
        return guarded.refused("connections") >= 1

    poll_for(put_off, 30.0)
    with Client(guarded.of("me")) as operator:
        assert operator.status(timeout_s=30.0)["system"] == "running"
