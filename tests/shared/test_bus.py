from __future__ import annotations

import socket
from typing import Any

import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

from ami_shared import limits
from ami_shared.bus import (
    EXPERIENCE,
    PARAMETERS,
    HubAddress,
    Port,
    SocketOptions,
    Waker,
    host_of,
    is_loopback,
    make_socket,
    speaks_ipv6,
)
from ami_shared.errors import ConfigurationError

Context = zmq.Context[zmq.Socket[bytes]]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:5550", "127.0.0.1", 5550),
        ("hub.local:1", "hub.local", 1),
        ("[::1]:65531", "::1", 65531),
        ("localhost:00005", "localhost", 5),
    ],
)
def test_a_hub_is_host_and_port(text: str, host: str, port: int) -> None:
    assert HubAddress.parse(text) == HubAddress(host, port)


@pytest.mark.parametrize(
    "text",
    ["", "nowhere", "5550", ":5550", "host:", "host:0", "host:65532", "host:-1", "host:5550x", "host: 5550", "host:²",
     "host:५", "host:" + "9" * 5_000, "[]:5550", "tcp://host"],
)  # fmt: skip
def test_what_is_no_hub_is_a_configuration_error_that_names_the_key(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^hub="):
        HubAddress.parse(text)


@given(st.text())
@example("a:b:²")
def test_any_text_is_a_hub_or_a_configuration_error(text: str) -> None:
    try:
        address = HubAddress.parse(text)
    except ConfigurationError:
        return
    assert 0 < address.port <= 65_531
    assert address.host


def test_the_five_ports_follow_each_other() -> None:
    address = HubAddress("10.0.0.1", 6000)
    assert sorted(address.endpoint(port) for port in Port) == [f"tcp://10.0.0.1:{6000 + i}" for i in range(5)]
    assert HubAddress("::1", 6000).endpoint(Port.CONTROL) == "tcp://[::1]:6000"
    assert address.at("0.0.0.0") == HubAddress("0.0.0.0", 6000)
    assert str(address) == "10.0.0.1:6000"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_loopback_stays_on_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "10.0.0.1", "192.168.0.1", "localhost.example.org", "", "eth0"])
def test_everything_else_does_not(host: str) -> None:
    assert not is_loopback(host)


def test_a_taken_port_is_a_configuration_error_that_says_what_to_do(context: Context, hub: HubAddress) -> None:
    make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL))
    with pytest.raises(ConfigurationError, match=r"taken by another process.*hub=host:port"):
        make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL))


@pytest.mark.parametrize("endpoint", ["nonsense://x", "tcp://127.0.0.1", "tcp://no-such-interface:5555"])
def test_what_is_no_address_is_a_configuration_error(context: Context, endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        make_socket(context, zmq.PUB, bind=endpoint)


def test_a_refused_socket_is_closed(hub: HubAddress) -> None:
    context: Context = zmq.Context()
    with pytest.raises(ConfigurationError):
        make_socket(context, zmq.PUB, bind="nonsense://x")
    context.term()  # would wait for ever for an open socket


def test_every_socket_has_its_options() -> None:
    with zmq.Context() as context:
        options = SocketOptions(7, 1_000, b"me", (b"topic",), 5_000)
        with make_socket(context, zmq.SUB, connect="tcp://127.0.0.1:9", options=options) as made:
            expected: dict[int, Any] = {
                zmq.SNDHWM: limits.SUBSCRIPTION_QUEUE, zmq.RCVHWM: limits.RECEIVING_QUEUE,
                zmq.MAXMSGSIZE: 1_000, zmq.ROUTING_ID: b"me", zmq.LINGER: 0,
                zmq.HEARTBEAT_IVL: 500, zmq.HEARTBEAT_TIMEOUT: 5_000, zmq.RECONNECT_IVL: 100,
                zmq.RECONNECT_IVL_MAX: 1_000, zmq.IPV6: 0, zmq.SNDBUF: 5_000,
            }  # fmt: skip
            assert {key: made.getsockopt(key) for key in expected} == expected


@pytest.mark.parametrize("kind", [zmq.SUB, zmq.XSUB, zmq.XPUB, zmq.ROUTER, zmq.DEALER])
def test_no_receiving_queue_is_ever_full(kind: int) -> None:
    with zmq.Context() as context, make_socket(context, kind) as made:
        assert made.getsockopt(zmq.RCVHWM) == limits.RECEIVING_QUEUE  # else libzmq ends the process, see bus.py


def test_a_router_says_who_cannot_be_reached(context: Context, hub: HubAddress) -> None:
    router = make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL))
    with pytest.raises(zmq.ZMQError) as caught:
        router.send_multipart([b"nobody", b"hello"])
    assert caught.value.errno == zmq.EHOSTUNREACH


@pytest.mark.parametrize("binds", [True, False], ids=["a listening socket", "a dialling socket"])
def test_a_frame_beyond_the_limit_never_arrives(context: Context, hub: HubAddress, binds: bool) -> None:
    endpoint, limited = hub.endpoint(Port.CONTROL), SocketOptions(max_frame_bytes=1_000)
    if binds:
        receiver = make_socket(context, zmq.PULL, bind=endpoint, options=limited)
        sender = make_socket(context, zmq.PUSH, connect=endpoint)
    else:
        sender = make_socket(context, zmq.PUSH, bind=endpoint)
        receiver = make_socket(context, zmq.PULL, connect=endpoint, options=limited)
    sender.send(b"a" * 1_000)
    assert receiver.poll(30_000)
    assert len(receiver.recv()) == 1_000
    sender.send(b"b" * 1_001)
    assert not receiver.poll(200)


def test_without_the_limit_the_attack_works(context: Context, hub: HubAddress) -> None:
    endpoint = hub.endpoint(Port.CONTROL)
    receiver = context.socket(zmq.PULL)
    receiver.bind(endpoint)
    receiver.setsockopt(zmq.MAXMSGSIZE, 1_000)  # too late: ignored without a word
    sender = make_socket(context, zmq.PUSH, connect=endpoint)
    sender.send(b"b" * 1_001)
    assert receiver.poll(30_000)


def test_a_new_process_takes_over_the_name_of_its_dead_predecessor(context: Context, hub: HubAddress) -> None:
    router = make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL))
    for word in (b"first", b"second"):
        dealer = make_socket(
            context, zmq.DEALER, connect=hub.endpoint(Port.CONTROL), options=SocketOptions(routing_id=b"body/1")
        )
        dealer.send(word)
        assert router.poll(30_000)
        assert router.recv_multipart() == [b"body/1", word]
    router.send_multipart([b"body/1", b"answer"])
    assert dealer.poll(30_000)


def test_a_waker_ends_a_poll_and_forgets_when_cleared() -> None:
    waker, poller = Waker(), zmq.Poller()
    poller.register(waker.fileno(), zmq.POLLIN)
    assert not poller.poll(0)
    waker.wake()
    waker.wake()
    assert poller.poll(30_000)
    waker.clear()
    assert not poller.poll(0)
    waker.close()
    waker.wake()  # harmless when the link has ended


def test_a_waker_over_tcp_as_on_windows_waits_for_no_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    monkeypatch.setattr(socket, "socketpair", lambda: (receiver, sender))
    waker = Waker()
    assert sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    waker.wake()
    waker.close()


def test_a_waker_nobody_listens_to_never_blocks() -> None:
    waker = Waker()
    for _ in range(100_000):
        waker.wake()
    waker.clear()
    waker.close()


def test_snapshots_have_small_queues_and_large_frames() -> None:
    assert PARAMETERS.queue == limits.PARAMETER_QUEUE < EXPERIENCE.queue
    assert PARAMETERS.max_frame_bytes > EXPERIENCE.max_frame_bytes > 0


def test_streams_have_little_on_their_way() -> None:
    assert PARAMETERS.send_buffer_bytes == EXPERIENCE.send_buffer_bytes == limits.SEND_BUFFER_BYTES > 0


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [("tcp://127.0.0.1:5550", False), ("tcp://[::1]:5550", True), ("tcp://*:5550", True), ("tcp://0.0.0.0:1", False)],
)
def test_ipv6_is_spoken_where_the_address_is_one(endpoint: str, expected: bool) -> None:
    assert speaks_ipv6(host_of(endpoint)) is expected


def test_of_a_name_with_both_kinds_of_address_the_hub_s_is_dialled(
    monkeypatch: pytest.MonkeyPatch, hub: HubAddress
) -> None:
    """As on most machines, where localhost is ::1, too, and comes first."""
    known = {socket.AF_INET: [("both", 0)], socket.AF_INET6: [("both", 0), ("six", 0)]}

    def look_up(host: str, port: object, family: int = 0) -> list[object]:
        if found := [entry for entry in known[family] if entry[0] == host]:
            return list(found)
        raise socket.gaierror(host)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    speaks_ipv6.cache_clear()
    assert [speaks_ipv6(host) for host in ("both", "six", "none")] == [False, True, False]
    speaks_ipv6.cache_clear()
