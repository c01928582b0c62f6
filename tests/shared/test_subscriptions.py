from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq

from ami_shared.bus import HubAddress, Port, SocketOptions, make_socket
from ami_shared.subscriptions import Subscriptions

Context = zmq.Context[zmq.Socket[bytes]]


def test_it_knows_what_anybody_wants_by_now(context: Context, hub: HubAddress, poll_for: Callable[..., Any]) -> None:
    publisher = make_socket(context, zmq.XPUB, bind=hub.endpoint(Port.EXPERIENCE_IN))
    wishes = Subscriptions(publisher, [b"places/body", b"experience/a", b"experience/ab"])
    assert not wishes.want(b"places/body")
    options = SocketOptions(subscriptions=(b"places/", b"experience/a"))
    reader = make_socket(context, zmq.SUB, connect=hub.endpoint(Port.EXPERIENCE_IN), options=options)
    poll_for(lambda: wishes.want(b"places/body"))
    assert wishes.want(b"experience/a")
    assert wishes.want(b"experience/ab"), "topics are prefixes"
    assert not wishes.want(b"experience/b")
    for n in range(5_000):
        reader.subscribe(b"stranger/%d" % n)
    reader.subscribe(b"experience/ab")
    poll_for(lambda: wishes.hear() or b"experience/ab" in wishes._prefixes)
    assert wishes._prefixes == {b"places/", b"experience/a", b"experience/ab"}, "nothing else is remembered"
    reader.unsubscribe(b"experience/ab")
    reader.unsubscribe(b"experience/a")
    poll_for(lambda: not wishes.want(b"experience/a"))
    reader.close()
    poll_for(lambda: not wishes.want(b"places/body"))
