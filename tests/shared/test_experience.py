from __future__ import annotations

from typing import Any

import pytest

from ami_shared import wire
from ami_shared.errors import WireError
from ami_shared.experience import EXTENT, FETCH, FETCHED, Extent, Fetch, Fetched, fetched_topic
from ami_shared.wire import Message


def over_the_wire(message: Message) -> Message:
    return wire.decode([bytes(frame) for frame in wire.encode(message)])


def test_messages_are_read_back_as_they_were_written() -> None:
    extent = Extent("body", "inc", (3, 9))
    assert Extent.from_message(over_the_wire(extent.to_message())) == extent
    fetch = Fetch("ppo", "body", "inc", (3, 5))
    assert Fetch.from_message(over_the_wire(fetch.to_message("mine"))) == fetch
    fetched = Fetched("body", "inc", (3, 5), ((3, 4),))
    message = fetched.to_message("ppo")
    assert Fetched.from_message(over_the_wire(message)) == fetched
    assert message.topic == fetched_topic("ppo") == b"fetched/ppo/"


@pytest.mark.parametrize("bad", [None, [1], [2, 1], [-1, 0], [0, 1 << 62], [0.0, 1], [False, True], ["0", "1"], {}])
def test_what_is_no_range_is_refused(bad: Any) -> None:
    fields = {"body": "b", "incarnation": "i", "range": bad, "gone": []}
    for kind, read in ((EXTENT, Extent), (FETCH, Fetch), (FETCHED, Fetched)):
        with pytest.raises(WireError):
            read.from_message(Message(kind, "x", "y", fields))  # type: ignore[attr-defined]
    with pytest.raises(WireError):
        Fetched.from_message(Message(FETCHED, "x", "y", {"range": [0, 1], "gone": [bad]}))
