from __future__ import annotations

from typing import Any

import pytest

from ami_shared import limits, wire
from ami_shared.errors import WireError
from ami_shared.experience import (
    EXTENT,
    FETCH,
    FETCHED,
    PLACES,
    Extent,
    Fetch,
    Fetched,
    Place,
    Places,
    fetched_topic,
)
from ami_shared.shared_memory import Reference
from ami_shared.wire import Message


def over_the_wire(message: Message) -> Message:
    return wire.decode([bytes(frame) for frame in wire.encode(message)])


def test_messages_are_read_back_as_they_were_written() -> None:
    extent = Extent("body", "inc", (3, 9))
    assert Extent.from_message(over_the_wire(extent.to_message())) == extent
    fetch = Fetch("ppo", "body", "inc", (3, 5))
    assert Fetch.from_message(over_the_wire(fetch.to_message("mine"))) == fetch
    near = Fetch("ppo", "body", "inc", (3, 5), places=True)
    assert Fetch.from_message(over_the_wire(near.to_message("mine"))) == near
    fetched = Fetched("body", "inc", (3, 5), ((3, 4),))
    message = fetched.to_message("ppo")
    assert Fetched.from_message(over_the_wire(message)) == fetched
    assert message.topic == fetched_topic("ppo") == b"fetched/ppo/"


MEMORY = Reference(12, 7, bytes(range(16)), 0, 4_096)


def test_places_are_read_back_and_go_to_all_or_to_whom_asked() -> None:
    places = Places("body", "inc", MEMORY, (Place((3, 5), ((0, 20), (64, 1_000))), Place((5, 6), ((1 << 40, 9),))))
    for trainer, topic in ((None, b"places/body/"), ("ppo", b"fetched/ppo/")):
        message = places.to_message(trainer)
        assert message.topic == topic
        assert Places.from_message(over_the_wire(message)) == places


@pytest.mark.parametrize(
    "batches",
    [
        None,
        [7],
        [[[0, 1]]],
        [[[0, 1], []]],
        [[[1, 0], [[0, 1]]]],
        [[[0, 1], [[0]]]],
        [[[0, 1], [[-1, 8]]]],
        [[[0, 1], [[0, -8]]]],
        [[[0, 1], [[True, 8]]]],
        [[[0, 1], [[0.0, 8]]]],
        [[[0, 1], [[1 << 63, 8]]]],
        [[[0, 1], [[0, MEMORY.nbytes + 1]]]],
        [[[0, 1], [[0, 3_000], [0, 3_000]]]],
        [[[0, 1], [[0, 1]] * (limits.PLACES_SPANS + 1)]],
        [[[0, 1], [[0, 1]] * (limits.PLACES_SPANS // 2 + 1)]] * 2,
        [[[0, 1], [[0, 8]]]] * (limits.FETCH_BATCHES + 1),
    ],
)
def test_what_are_no_places_is_refused_before_anything_is_looked_at(batches: Any) -> None:
    with pytest.raises(WireError):
        Places.from_message(Message(PLACES, "body", "inc", {"memory": MEMORY.to_list(), "batches": batches}))
    with pytest.raises(WireError):
        Places.from_message(Message(PLACES, "body", "inc", {"memory": [1], "batches": []}))


@pytest.mark.parametrize("bad", [None, [1], [2, 1], [-1, 0], [0, 1 << 62], [0.0, 1], [False, True], ["0", "1"], {}])
def test_what_is_no_range_is_refused(bad: Any) -> None:
    fields = {"body": "b", "incarnation": "i", "range": bad, "gone": []}
    for kind, read in ((EXTENT, Extent), (FETCH, Fetch), (FETCHED, Fetched)):
        with pytest.raises(WireError):
            read.from_message(Message(kind, "x", "y", fields))  # type: ignore[attr-defined]
    with pytest.raises(WireError):
        Fetched.from_message(Message(FETCHED, "x", "y", {"range": [0, 1], "gone": [bad]}))


def test_an_answer_that_says_too_much_is_refused() -> None:
    many = {"range": [0, 1_000], "gone": [[n, n + 1] for n in range(limits.FETCH_BATCHES + 2)]}
    with pytest.raises(WireError, match="limit"):
        Fetched.from_message(Message(FETCHED, "x", "y", many))
