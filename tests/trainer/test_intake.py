"""The experience stream's receiving end, with a real socket where the hub would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq
from learning import batch_of

from ami_shared import wire
from ami_shared.bus import HubAddress, Port, make_socket
from ami_shared.errors import WireError
from ami_shared.records import RecordBatch
from ami_shared.wire import Message
from ami_trainer.intake import Intake

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]


class Rig:
    """An intake, and what it handed on."""

    def __init__(self, context: Context, hub: HubAddress) -> None:
        self.hub_end = make_socket(context, zmq.XPUB, bind=hub.endpoint(Port.EXPERIENCE_OUT))
        self.taken: list[tuple[list[int], bool]] = []
        self.intake = Intake(context, hub, self._consume)
        self.intake.start()

    def _consume(self, batch: RecordBatch, continues: bool) -> None:
        if "observation" not in batch.data:
            raise WireError("no observation")
        numbers = list(range(batch.first_sequence, batch.first_sequence + len(batch)))
        self.taken.append((numbers, continues))

    def publish(self, batch: RecordBatch) -> None:
        self.hub_end.send_multipart(wire.encode(batch.to_message()))

    def told(self) -> dict[str, Any]:
        return self.intake.statistics()


@pytest.fixture
def rig(context: Context, hub: HubAddress) -> Iterator[Rig]:
    made = Rig(context, hub)
    assert made.hub_end.poll(3_000)
    assert made.hub_end.recv() == b"\x01experience/"  # its subscription
    yield made
    made.intake.close()
    assert not made.intake.is_alive()


def test_records_are_handed_on_in_order_once_or_counted_as_lost(rig: Rig, poll_for: PollFor) -> None:
    for first, count in ((10, 3), (13, 2), (12, 4), (10, 2), (20, 1)):
        rig.publish(batch_of(count, first=first))
    poll_for(lambda: len(rig.taken) == 4)
    assert rig.taken == [([10, 11, 12], False), ([13, 14], True), ([15], True), ([20], False)]
    told = rig.told()
    assert (told["received"], told["lost"], told["duplicates"]) == ({"body": 7}, {"body": 4}, 5)
    assert rig.intake.records == 7


def test_every_body_has_a_stream_of_its_own(rig: Rig, poll_for: PollFor) -> None:
    for body in ("a", "b"):
        rig.publish(replace(batch_of(2, first=5), body=body))
    rig.publish(replace(batch_of(1, first=7), body="a"))
    poll_for(lambda: len(rig.taken) == 3)
    assert rig.taken[2] == ([7], True)
    assert rig.told()["received"] == {"a": 3, "b": 2}


def test_a_body_that_was_started_again_begins_anew(rig: Rig, poll_for: PollFor) -> None:
    rig.publish(batch_of(2, first=50))
    rig.publish(replace(batch_of(2, first=0), incarnation="b"))
    poll_for(lambda: len(rig.taken) == 2)
    assert rig.taken[1] == ([0, 1], False)
    assert rig.told()["lost"] == {"body": 0}


def test_malformed_experience_is_counted_and_the_stream_goes_on(rig: Rig, poll_for: PollFor) -> None:
    topic = b"experience/body"
    short = batch_of(3).to_message()
    junk: list[Any] = [
        [topic],
        [topic, b"\xc1"],
        wire.encode(Message("snapshot", "body", "a", topic=topic)),
        wire.encode(replace(short, arrays={**short.arrays, "time": np.zeros(2)})),
        wire.encode(batch_of(1, action=np.zeros(5, np.int64)).to_message()),
    ]
    for frames in junk:
        rig.hub_end.send_multipart(frames)
    poll_for(lambda: rig.intake.wire_errors == len(junk))
    assert rig.told()["experience_wire_errors"] == len(junk)
    rig.publish(batch_of(1, first=100))
    poll_for(lambda: rig.taken)
    assert rig.taken[0][0] == [100]


def test_records_that_do_not_fit_the_buffer_are_lost(rig: Rig, poll_for: PollFor) -> None:
    rig.publish(batch_of(2))
    rig.publish(batch_of(3, first=2, action=np.zeros(5, np.int64)))
    rig.publish(batch_of(1, first=5))
    poll_for(lambda: len(rig.taken) == 2)
    told = rig.told()
    assert (told["received"], told["lost"]) == ({"body": 3}, {"body": 3})
    assert rig.intake.records == 3
