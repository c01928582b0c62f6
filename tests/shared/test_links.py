"""What a socket's monitor is made of: connections that were there, and such as never came to be."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import zmq

from ami_shared.bus import HubAddress, Port, make_socket
from ami_shared.links import BROKEN_OFF_OFTEN, LinkWatch, port_statistics

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]


def test_a_link_whose_first_handshakes_were_broken_off_is_up_when_it_is(
    context: Context, hub: HubAddress, poll_for: PollFor
) -> None:
    """As where a hub is stopped for a while, or restarts behind a forwarding process."""
    with socket.socket() as breaker:
        breaker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        breaker.bind((hub.host, hub.port))
        breaker.listen()
        watch = LinkWatch()
        dialling = make_socket(context, zmq.DEALER, connect=hub.endpoint(Port.CONTROL), watch=watch)
        for _ in range(BROKEN_OFF_OFTEN):
            breaker.accept()[0].close()

        def broken_off() -> bool:
            watch.drain()
            return watch.counts["broken off"] >= BROKEN_OFF_OFTEN

        poll_for(broken_off)
        assert watch.doubt
        assert watch.statistics()["state"] == "down"
    hub_watch = LinkWatch()
    router = make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL), watch=hub_watch)
    poll_for(lambda: watch.statistics()["state"] == "up")
    assert watch.statistics()["lost"] == 0, "what never was cannot be lost"
    router.close()
    poll_for(lambda: watch.statistics()["state"] == "down")
    assert watch.statistics()["lost"] == 1
    for each in (watch, hub_watch):
        each.close()
    dialling.close()


def test_strangers_at_a_port_are_no_connections_that_were_lost(context: Context, poll_for: PollFor) -> None:
    watch = LinkWatch()
    listening = make_socket(context, zmq.ROUTER, bind="tcp://127.0.0.1:*", watch=watch)
    endpoint = str(listening.last_endpoint.decode())
    own = make_socket(context, zmq.DEALER, connect=endpoint)
    address = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
    for _ in range(5):
        socket.create_connection(address).close()

    def told() -> dict[str, int]:
        watch.drain()
        return port_statistics({"it": watch})["it"]

    poll_for(lambda: (told()["made"], told()["failed"]) == (1, 5))
    assert told()["lost"] == 0
    own.close()
    poll_for(lambda: told() == {"made": 1, "lost": 1, "failed": 5})
    watch.close()
    listening.close()


def test_closing_a_watch_before_its_socket_leaves_other_sockets_of_the_context_alive(
    context: Context, poll_for: PollFor
) -> None:
    """An event between the two would be told to nobody, and libzmq's own thread wait for somebody without end."""
    watch = LinkWatch()
    watched = make_socket(context, zmq.XSUB, bind="tcp://127.0.0.1:*", watch=watch)
    other = make_socket(context, zmq.REP, bind="tcp://127.0.0.1:*")
    theirs: Context = zmq.Context()
    peer, asking = theirs.socket(zmq.PUB), theirs.socket(zmq.REQ)
    try:
        peer.connect(watched.get_string(zmq.LAST_ENDPOINT))
        asking.connect(other.get_string(zmq.LAST_ENDPOINT))
        poll_for(lambda: watch.drain() or port_statistics({"it": watch})["it"]["made"] == 1)
        watch.close()
        peer.close(linger=0)
        time.sleep(0.2)
        asking.send(b"?")
        assert other.poll(30_000)
        other.send(other.recv())
        assert asking.poll(30_000)
    finally:
        theirs.destroy(linger=0)
        watched.close(linger=0)
        other.close(linger=0)
