"""Two ways to a snapshot, and how a feed goes from one to the other: over real sockets, with real memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq

from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, make_socket
from ami_shared.receiving import receive_all
from ami_shared.shared_memory import Piece
from ami_shared.snapshot_feed import SnapshotFeed
from ami_shared.snapshots import Layout, Notice, Snapshot
from capabilities import sharing_memory

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]
LAYOUT = Layout.of({"weight": ("float32", (100,))})
log = logging.getLogger(__name__)


class Hub:
    """The hub's end, as a publisher that hears what is subscribed to; and a trainer's memory."""

    def __init__(self, context: Context, address: HubAddress) -> None:
        self.socket = make_socket(context, zmq.XPUB, bind=address.endpoint(Port.PARAMETERS_OUT))
        self.subscribed: set[bytes] = set()
        self.piece = Piece(LAYOUT.nbytes)

    def hear(self) -> set[bytes]:
        while self.socket.poll(100):
            wish = self.socket.recv()
            (self.subscribed.add if wish[:1] == b"\x01" else self.subscribed.discard)(wish[1:])
        return self.subscribed

    def notice(self, version: int, within_reach: bool = True, model: str = "encoder") -> None:
        self.piece.lock()
        LAYOUT.arrays(self.piece.content)["weight"][:] = version
        self.piece.unlock()
        reference = self.piece.reference if within_reach else None
        layout = LAYOUT if reference else Layout((), 0)
        self.send(Notice(model, version, 1.0, reference, layout).to_message("trainer", "1"))

    def snapshot(self, version: int) -> None:
        arrays = {"weight": np.full(100, version, np.float32)}
        self.send(Snapshot("encoder", version, 1.0, arrays).to_message("trainer", "1"))

    def send(self, message: wire.Message) -> None:
        self.socket.send_multipart(wire.encode(message))


class Following:
    """A feed, and what it brought: version and value of each snapshot."""

    def __init__(self, context: Context, address: HubAddress, models: list[str] | None) -> None:
        self.got: list[tuple[int, float]] = []
        self.newest: Snapshot | None = None
        self.feed = SnapshotFeed(context, address, models, self._take, log)

    def _take(self, snapshot: Snapshot) -> None:
        self.newest = snapshot
        self.got.append((snapshot.version, float(snapshot.arrays["weight"].flat[0])))

    def serve(self, until: int) -> None:
        deadline = time.monotonic() + 30.0
        while len(self.got) + self.feed.malformed.count < until:
            assert time.monotonic() < deadline, self.got
            self.feed.serve_once()


def in_parts(version: int, count: int) -> list[wire.Message]:
    arrays = {f"w{n}": np.full(4, version, np.float32) for n in range(count)} | {"weight": np.full(9, version, "f4")}
    return list(Snapshot("encoder", version, 1.0, arrays).to_parts("trainer", "1"))


@pytest.fixture
def upstream(context: Context, hub: HubAddress) -> Hub:
    return Hub(context, hub)


@pytest.fixture(params=[["encoder"], None], ids=["one model", "all models"])
def following(
    request: pytest.FixtureRequest, context: Context, hub: HubAddress, upstream: Hub, poll_for: PollFor
) -> Iterator[Following]:
    made = Following(context, hub, request.param)
    of = b"encoder/" if request.param else b""
    poll_for(lambda: {b"notices/" + of, b"parameters/" + of} <= upstream.hear())
    yield made
    made.feed.close()


def asks_for_bytes(upstream: Hub) -> bool:
    return any(topic.startswith(b"parameters/") for topic in upstream.hear())


def test_both_ways_are_open_at_first(upstream: Hub, following: Following) -> None:
    assert asks_for_bytes(upstream)
    upstream.snapshot(3)
    following.serve(until=1)
    assert following.got == [(3, 3.0)]
    told = following.feed.statistics()
    assert (told["snapshots_from_memory"], told["snapshots_from_wire"]) == (0, 1)


@sharing_memory
def test_memory_within_reach_makes_bytes_unwanted_until_it_is_out_of_reach(
    upstream: Hub, following: Following, poll_for: PollFor
) -> None:
    assert asks_for_bytes(upstream)
    upstream.notice(4)
    following.serve(until=1)
    assert following.got == [(4, 4.0)]
    poll_for(lambda: not asks_for_bytes(upstream))
    upstream.notice(5, within_reach=False)
    poll_for(lambda: following.feed.serve_once() or asks_for_bytes(upstream))
    upstream.snapshot(5)
    following.serve(until=2)
    assert following.got == [(4, 4.0), (5, 5.0)]
    upstream.notice(6)
    following.serve(until=3)
    assert following.got[-1] == (6, 6.0)
    poll_for(lambda: not asks_for_bytes(upstream))


def test_without_shared_memory_everything_comes_over_the_wire(
    upstream: Hub, following: Following, monkeypatch: pytest.MonkeyPatch, poll_for: PollFor
) -> None:
    monkeypatch.setattr("ami_shared.shared_memory.can_share", lambda: False)
    upstream.notice(4)
    poll_for(lambda: following.feed.serve_once() or following.feed._over_the_wire == {"encoder": True})
    upstream.snapshot(4)
    following.serve(until=1)
    assert following.got == [(4, 4.0)]
    assert asks_for_bytes(upstream)


def test_malformed_notices_are_counted(upstream: Hub, following: Following) -> None:
    for frames in ([b"notices/encoder/", b"\xc1"], [b"notices/encoder/"]):
        upstream.socket.send_multipart(frames)
    following.serve(until=2)
    assert following.feed.malformed.count == 2
    upstream.snapshot(9)
    following.serve(until=3)
    assert following.got == [(9, 9.0)]


def test_the_number_of_models_is_bounded(upstream: Hub, context: Context, hub: HubAddress, poll_for: PollFor) -> None:
    following = Following(context, hub, None)
    poll_for(lambda: b"notices/" in upstream.hear())
    for n in range(limits.MOST_MODELS + 3):
        upstream.notice(1, within_reach=False, model=f"model{n}")
        following.feed.serve_once()
    following.serve(until=3)
    assert following.feed.malformed.count == 3
    following.feed.close()


def test_parts_become_a_snapshot_when_the_last_one_is_here_and_a_newer_one_overtakes(
    upstream: Hub, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SNAPSHOT_PART_BYTES", 16)
    first, second, third = in_parts(1, 3), in_parts(2, 3), in_parts(3, 5)
    assert len(first) == 4
    for message in (first[1], first[0], first[0], first[2], second[0], first[3], *second[2:], *third, second[1]):
        upstream.send(message)
    following.serve(until=1)
    for message in in_parts(4, 2):
        upstream.send(message)
    following.serve(until=2)
    assert following.got == [(3, 3.0), (4, 4.0)]
    assert following.feed.malformed.count == 0


@pytest.mark.parametrize("halved", [False, True])
def test_what_came_in_parts_may_be_used_where_it_is(
    halved: bool, upstream: Hub, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SNAPSHOT_PART_BYTES", 16)
    arrays = {"weight": np.full((3, 5), 2.5, np.float32), "steps": np.array(7), "empty": np.zeros((0, 4), np.float64)}
    for message in Snapshot("encoder", 1, 1.0, arrays).to_parts("trainer", "1", halved):
        upstream.send(message)
    following.serve(until=1)
    snapshot = following.newest
    assert snapshot is not None
    assert (snapshot.lasting, snapshot.halved) == (True, halved)
    for name, array in snapshot.arrays.items():
        assert array.flags.writeable, "torch takes no others"
        assert array.flags.aligned
        np.testing.assert_array_equal(array, arrays[name], strict=True)


def test_of_snapshots_that_wait_only_the_newest_is_used(upstream: Hub, following: Following, poll_for: PollFor) -> None:
    for version in (1, 2, 4, 3):
        upstream.snapshot(version)
    feed = following.feed

    def have_arrived() -> bool:
        receive_all(feed._socket, feed._dispatch, feed.malformed)
        return feed.statistics()["snapshots_from_wire"] == 4

    poll_for(have_arrived)
    following.serve(until=1)
    assert following.got == [(4, 4.0)]
    assert feed.statistics()["snapshots_passed_over"] == 3


def test_parts_of_two_processes_make_no_snapshot_though_they_say_the_same_version(
    monkeypatch: pytest.MonkeyPatch, upstream: Hub, following: Following
) -> None:
    monkeypatch.setattr(limits, "SNAPSHOT_PART_BYTES", 1_000)

    def parts(value: float, incarnation: str) -> list[wire.Message]:
        arrays = {f"w{n}": np.full(1_000, value, np.float32) for n in range(4)}
        return list(Snapshot("encoder", 9, 1.0, arrays).to_parts("trainer", incarnation))

    dying, successor = parts(1.0, "1"), parts(2.0, "2")
    assert len(successor) == 4
    for part in (*dying[2:], *successor[:2]):
        following.feed._dispatch(part)
    assert not following.feed._newest
    for part in successor[2:]:
        following.feed._dispatch(part)
    whole = following.feed._newest["encoder"]
    assert {float(array[0]) for array in whole.arrays.values()} == {2.0}
