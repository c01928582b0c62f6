"""Records that are copied out of the memory of a body of the same host, and what happens where that cannot be."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq
from intake_rig import Rig
from learning import numbered

from ami_shared import limits, shared_memory, wire
from ami_shared.bus import HubAddress
from ami_shared.checkpoints import Cut
from ami_shared.experience import Extent, Fetch, Fetched, Place, Places
from ami_shared.records import RecordBatch
from ami_shared.shared_memory import Reference
from ami_shared.shared_ring import Ring
from ami_trainer.intake import POLL_MS
from ami_trainer.life import SPOILT_ANSWERS
from capabilities import sharing_memory
from mutations import mutated

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]
pytestmark = sharing_memory


class NearBody:
    """The memory of a body, and what it tells of it."""

    def __init__(self, rig: Rig, life: str = "a", capacity: int = 1 << 20) -> None:
        self._rig, self._life = rig, life
        self.ring = Ring(capacity)

    def place(self, first: int, end: int, body: str = "body") -> Place:
        batch = replace(numbered(end - first, first, self._life), body=body)
        return Place((first, end), tuple(map(self.ring.keep, wire.encode(batch.to_message())[1:])))

    def tell(self, *places: Place, trainer: str | None = None, memory: Reference | None = None) -> None:
        reference = memory or self.ring.reference
        assert reference is not None
        self._rig.send(Places("body", self._life, reference, places).to_message(trainer))

    def told_extent(self, first: int, end: int) -> None:
        self._rig.send(Extent("body", self._life, (first, end)).to_message())


HELD = Cut("held", ())


class NumberedRig(Rig):
    def _consume(self, batch: RecordBatch, continues: bool) -> None:
        assert batch.data["number"][:, 0].tolist() == list(range(batch.first_sequence, batch.end))
        super()._consume(replace(batch, data={"observation": batch.data["number"]}), continues)

    @property
    def numbers(self) -> list[int]:
        return [number for numbers, _ in self.taken for number in numbers]

    def hold(self, poll_for: PollFor) -> None:
        """Let the buffer take nothing, as at a cut, until release()."""
        self.intake.feeder.wish_cut(HELD)
        poll_for(lambda: self.intake.feeder.cut)

    def release(self) -> None:
        self.intake.feeder.pass_cut(HELD)

    def waiting(self) -> int:
        """How many things that the body has told wait for their turn."""
        return len(self.intake.feeder._announced.get("body", ()))

    def of_body(self, counter: str) -> int:
        return self.told()["streams"].get("body", {}).get(counter, 0)

    def hear(self, wish: bytes) -> None:
        """Wait until the intake subscribes, or takes that back."""
        while self.hub_end.poll(30_000):
            if self.hub_end.recv() == wish:
                return
        raise AssertionError(f"never heard {wish!r}")


@pytest.fixture
def near(context: Context, hub: HubAddress, monkeypatch: pytest.MonkeyPatch) -> Iterator[NumberedRig]:
    monkeypatch.setattr(limits, "FETCH_PATIENCE", 600.0)  # what a test answers late is not asked for again
    made = NumberedRig(context, hub)
    made.hear(b"\x01experience/")
    made.hear(b"\x01places/")
    yield made
    made.intake.close()
    assert not made.intake.is_alive()


@pytest.fixture
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one batch be copied only when the one before it has been taken."""
    monkeypatch.setattr(limits, "COPIED_AHEAD_BYTES", 1)


def memory_held() -> int:
    """How many descriptors of shared memory this process holds."""
    gc.collect()
    held = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            held += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{shared_memory.NAME}")
    return held


def test_records_come_out_of_memory_and_their_bytes_are_not_asked_for_any_more(
    near: NumberedRig, poll_for: PollFor
) -> None:
    body = NearBody(near)
    body.tell(body.place(0, 3), body.place(3, 5))
    near.hear(b"\x00experience/")
    near.send(replace(numbered(9, first=5).to_message(), topic=b"extent/body/"))  # as if on its way already
    body.tell(body.place(5, 6))
    poll_for(lambda: len(near.numbers) == 6)
    assert near.numbers == list(range(6))
    assert near.of_body("records_from_memory") == 6
    assert (near.of_streams("received"), near.of_streams("lost")) == ({"body": 6}, {"body": 0})
    assert near.of_body("bytes_received") > 0


def test_a_body_out_of_reach_is_listened_to_beside_a_near_one(near: NumberedRig, poll_for: PollFor) -> None:
    body = NearBody(near)
    body.tell(body.place(0, 2))
    near.hear(b"\x00experience/")
    far = Extent("far", "x", (0, 0)).to_message()
    near.send(far)
    near.hear(b"\x01experience/far/")
    near.publish(replace(numbered(2, life="x"), body="far"))
    poll_for(lambda: near.of_streams("received") == {"body": 2, "far": 2})
    assert near.of_body("records_from_memory") == 2


def test_what_was_written_over_before_it_was_read_is_asked_for_and_comes_by_its_place(
    near: NumberedRig, poll_for: PollFor
) -> None:
    body = NearBody(near, capacity=64 << 10)
    body.tell(body.place(0, 2))
    poll_for(lambda: near.numbers == [0, 1])
    early = body.place(2, 4)
    while early.spans[0][0] >= body.ring.gone:
        body.ring.array((1_000,), "uint8")
    body.tell(early, body.place(4, 6))
    poll_for(lambda: near.asked)
    assert near.asked == [Fetch("ppo", "body", "a", (2, 4), places=True)]
    body.tell(body.place(2, 4), trainer="ppo")
    near.send(Fetched("body", "a", (2, 4)).to_message("ppo"))
    poll_for(lambda: len(near.numbers) == 6)
    assert near.of_streams("lost") == {"body": 0}


def test_memory_out_of_reach_means_that_the_bytes_are_asked_for(near: NumberedRig, poll_for: PollFor) -> None:
    body = NearBody(near)
    stranger = replace(body.ring.reference, token=bytes(16))  # type: ignore[type-var]
    body.tell(body.place(0, 2), memory=stranger)
    near.publish(numbered(2))
    body.told_extent(0, 4)
    poll_for(lambda: near.asked)
    poll_for(lambda: near.numbers == [0, 1])
    assert near.asked == [Fetch("ppo", "body", "a", (2, 4), places=False)]
    assert near.of_body("records_from_memory") == 0


def test_whose_memory_is_out_of_reach_is_not_listened_to_for_places_until_it_is_tried_again(
    near: NumberedRig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = NearBody(near)
    stranger = replace(body.ring.reference, token=bytes(16))  # type: ignore[type-var]
    body.tell(body.place(0, 2), memory=stranger)
    near.hear(b"\x00places/")
    near.send(Extent("other", "x", (0, 0)).to_message())
    near.hear(b"\x01places/other/")
    near.publish(numbered(2))
    poll_for(lambda: near.numbers == [0, 1])
    monkeypatch.setattr(limits, "REACH_AGAIN", 0.0)
    near.hear(b"\x01places/")
    body.tell(body.place(2, 4))
    near.hear(b"\x00experience/")
    poll_for(lambda: near.numbers == [0, 1, 2, 3])
    assert near.of_body("records_from_memory") == 2


def test_another_s_records_in_a_body_s_memory_are_refused(near: NumberedRig, poll_for: PollFor) -> None:
    body = NearBody(near)
    body.tell(body.place(0, 2, body="other"))
    poll_for(lambda: near.told()["experience_wire_errors"] == 1)
    junk = Place((0, 2), (body.ring.keep(b"\xc1" * 20),))
    body.tell(junk)
    poll_for(lambda: near.told()["experience_wire_errors"] == 2)
    body.tell(body.place(0, 2))
    poll_for(lambda: near.numbers == [0, 1])


def test_one_malformed_batch_of_many_costs_no_other(near: NumberedRig, poll_for: PollFor) -> None:
    body = NearBody(near)
    body.tell(body.place(0, 4))
    poll_for(lambda: near.numbers == [0, 1, 2, 3])
    batches = [numbered(2, first, "a") for first in range(4, 24, 2)]
    batches[0] = replace(batches[0], times=np.full(2, np.nan))
    frames = [(batch, wire.encode(batch.to_message())[1:]) for batch in batches]
    places = [
        Place((batch.first_sequence, batch.end), tuple(map(body.ring.keep, of_batch))) for batch, of_batch in frames
    ]
    body.tell(*places[1:0:-1])  # there is a gap, and so a question
    for n in range(SPOILT_ANSWERS):
        poll_for(lambda n=n: len(near.asked) > n)
        body.tell(*places, trainer="ppo")
        near.send(Fetched("body", "a", (4, 24)).to_message("ppo"))
    poll_for(lambda: near.numbers == [0, 1, 2, 3, *range(6, 24)])
    assert near.of_body("lost") == 2


def test_a_slow_buffer_has_little_copied_ahead_and_all_in_the_end(
    near: NumberedRig, nothing_ahead: None, poll_for: PollFor
) -> None:
    body = NearBody(near)
    near.hold(poll_for)
    for first in range(0, 80, 2):
        body.tell(body.place(first, first + 2))
    body.told_extent(0, 80)
    poll_for(lambda: near.of_body("behind") == 80)
    assert near.of_body("records_from_memory") < 40, "the rest lies where it is safe"
    near.release()
    poll_for(lambda: len(near.numbers) == 80)
    assert near.numbers == list(range(80))
    assert near.of_body("behind") == 0
    assert not near.asked


def test_what_is_not_even_heard_of_is_fetched_later(
    near: NumberedRig, nothing_ahead: None, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNREAD_MESSAGES", 3)
    body = NearBody(near)
    near.hold(poll_for)
    body.tell(body.place(0, 2))
    poll_for(lambda: near.of_body("behind") == 2 and not near.waiting())  # copied: there is no room for more
    for first in range(2, 40, 2):
        body.tell(body.place(first, first + 2))
    poll_for(lambda: near.of_body("behind") + near.of_body("postponed") == 40)
    near.release()
    poll_for(lambda: near.of_body("behind") == 0)
    poll_for(lambda: body.told_extent(0, 40) or near.asked)
    first, end = near.asked[0].range
    assert 0 < first < end == 40
    poll_for(lambda: near.numbers == list(range(first)))


def test_what_was_told_and_waits_is_not_asked_for_again(
    near: NumberedRig, nothing_ahead: None, poll_for: PollFor
) -> None:
    body = NearBody(near)
    body.tell(body.place(0, 2))
    poll_for(lambda: near.numbers == [0, 1])
    near.hold(poll_for)
    body.told_extent(0, 40)
    poll_for(lambda: near.asked)
    for first in range(2, 40, 2):
        body.tell(body.place(first, first + 2), trainer="ppo")
    near.send(Fetched("body", "a", (2, 40)).to_message("ppo"))
    poll_for(lambda: near.waiting() == 19)
    life = near.intake.streams["body"].life
    assert life is not None
    life._ask_from = 0.0  # its patience is at an end
    time.sleep(3 * POLL_MS / 1000)
    near.release()
    poll_for(lambda: len(near.numbers) == 40)
    assert near.asked == [Fetch("ppo", "body", "a", (2, 40), places=True)]


def test_a_new_life_s_memory_takes_the_place_of_the_old(near: NumberedRig, poll_for: PollFor) -> None:
    before = memory_held()
    first = NearBody(near)
    first.tell(first.place(0, 2))
    poll_for(lambda: near.numbers == [0, 1])
    second = NearBody(near, life="b")
    del first
    second.tell(second.place(0, 3))
    poll_for(lambda: near.numbers == [0, 1, 0, 1, 2])
    assert near.of_body("records_from_memory") == 5
    assert memory_held() == before + 3, "two of one ring, and one of its reader"


def a_life_ahead_and_the_next(near: NumberedRig) -> tuple[NearBody, NearBody]:
    """Return two lives of one body, of the first of which twelve records have been told."""
    first, second = NearBody(near), NearBody(near, life="b")
    for number in range(0, 12, 2):
        first.tell(first.place(number, number + 2))
    return first, second


def test_a_life_that_comes_and_goes_while_much_waits_is_read_all_the_same(
    near: NumberedRig, nothing_ahead: None, poll_for: PollFor
) -> None:
    near.hold(poll_for)
    first, second = a_life_ahead_and_the_next(near)
    second.tell(second.place(0, 2))
    poll_for(lambda: len({told.ring for told in list(near.intake.feeder._announced.get("body", ()))}) == 2)
    del first, second
    near.release()
    poll_for(lambda: len(near.numbers) == 14)
    assert near.numbers == [*range(12), 0, 1]


def test_a_life_out_of_reach_waits_until_the_near_one_before_it_has_been_read(
    near: NumberedRig, nothing_ahead: None, poll_for: PollFor
) -> None:
    near.hold(poll_for)
    _first, second = a_life_ahead_and_the_next(near)  # whose memory lasts as long as they do
    poll_for(lambda: near.waiting() > 2)
    near.hear(b"\x00experience/")
    second.tell(second.place(0, 4), memory=replace(second.ring.reference, token=bytes(16)))  # on another host
    near.hear(b"\x01experience/")
    near.publish(numbered(4, life="b"))
    second.told_extent(0, 4)
    poll_for(lambda: near.of_body("postponed") == 4)
    near.release()
    poll_for(lambda: near.asked)
    poll_for(lambda: near.numbers == list(range(12)))
    assert near.asked == [Fetch("ppo", "body", "b", (0, 4), places=False)]
    told = near.told()["streams"]["body"]
    assert (told["lost"], told["postponed"]) == (0, 4)


def test_a_body_out_of_reach_never_waits_behind_its_places(
    near: NumberedRig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "COPIED_AHEAD_BYTES", 0)
    body = NearBody(near)
    stranger = replace(body.ring.reference, token=bytes(16))  # type: ignore[type-var]
    body.tell(body.place(0, 2), memory=stranger)
    body.told_extent(0, 4)
    body.told_extent(0, 6)
    poll_for(lambda: near.asked)
    assert near.asked == [Fetch("ppo", "body", "a", (4, 6), places=False)]


def test_only_records_may_carry_arrays(near: NumberedRig, poll_for: PollFor) -> None:
    heavy = Extent("body", "a", (0, 4)).to_message()
    near.send(replace(heavy, arrays={"ballast": np.zeros(4_096)}))
    poll_for(lambda: near.told()["experience_wire_errors"] == 1)
    assert not near.asked


def test_the_memory_of_a_silent_body_is_let_go_and_found_again(
    near: NumberedRig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SILENT_BODY", 0.3)
    body = NearBody(near)
    held = memory_held()
    body.tell(body.place(0, 2))
    near.hear(b"\x00experience/")
    near.hear(b"\x01experience/")
    assert memory_held() == held
    body.tell(body.place(2, 4))
    poll_for(lambda: near.numbers == [0, 1, 2, 3])


def test_without_such_memory_the_bytes_are_read(
    near: NumberedRig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = NearBody(near)
    monkeypatch.setattr(shared_memory, "can_share", lambda: False)
    body.tell(body.place(0, 2))
    near.publish(numbered(2))
    poll_for(lambda: near.numbers == [0, 1])
    assert near.of_body("records_from_memory") == 0


@pytest.mark.parametrize("count", [500, pytest.param(50_000, marks=pytest.mark.slow)])
def test_whatever_is_told_of_a_memory_is_read_or_refused(
    near: NumberedRig, count: int, chance: random.Random, poll_for: PollFor
) -> None:
    body = NearBody(near, capacity=1 << 16)
    body.tell(body.place(0, 3))
    poll_for(lambda: near.numbers == [0, 1, 2])
    for _ in range(count):
        reference = body.ring.reference
        assert reference is not None
        place = Place((chance.randrange(1 << 40), chance.randrange(1 << 40)), body.place(9, 12).spans)
        topic, *frames = wire.encode(
            Places("stranger", "other", reference, (place, body.place(9, 12, "stranger"))).to_message()
        )
        near.hub_end.send_multipart([topic, *mutated(frames, chance)])
        odd = replace(reference, **{chance.choice(("pid", "fd", "nbytes")): chance.randrange(1, 1 << 20)})
        spans = tuple((chance.randrange(1 << 47), chance.randrange(1 << 20)) for _ in range(chance.randrange(1, 4)))
        frames = wire.encode(Places("body", "a", chance.choice((odd, reference)), (Place((3, 6), spans),)).to_message())
        near.hub_end.send_multipart(frames)
    body.tell(body.place(3, 5))
    near.publish(numbered(2, first=3))  # which counts where the body is out of reach now, by what was told of it
    poll_for(lambda: near.numbers == [0, 1, 2, 3, 4])
    assert near.intake.malformed.count > 0
