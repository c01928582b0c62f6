"""The experience stream's receiving end, with a real socket where the hub would be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq
from intake_rig import Rig
from learning import batch_of

from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, make_socket
from ami_shared.checkpoints import Cut
from ami_shared.experience import Extent, Fetch, Fetched, fetched_topic
from ami_shared.membership import Identity
from ami_shared.records import RecordBatch
from ami_shared.wire import Message
from ami_trainer.frontier import BodyStream
from ami_trainer.intake import POLL_MS, Intake
from ami_trainer.life import SPOILT_ANSWERS

Context = zmq.Context[zmq.Socket[bytes]]
PollFor = Callable[..., Any]


@pytest.fixture
def rig(context: Context, hub: HubAddress, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(limits, "FETCH_PATIENCE", 600.0)  # what a test answers late is not asked for again
    made = Rig(context, hub)
    made.wait_subscribed()
    yield made
    made.intake.close()
    assert not made.intake.is_alive()


def test_records_are_handed_on_in_order_once_and_what_is_missing_is_fetched(rig: Rig, poll_for: PollFor) -> None:
    for first, count in ((10, 3), (13, 2), (12, 4), (10, 2), (20, 1)):
        rig.publish(batch_of(count, first=first))
    poll_for(lambda: rig.asked)
    assert rig.asked == [Fetch("ppo", "body", "a", (16, 20))]
    fetched = batch_of(2, first=16).to_message()
    rig.send(replace(fetched, topic=fetched_topic("ppo")))
    rig.send(Fetched("body", "a", (16, 20), gone=((18, 20),)).to_message("ppo"))
    poll_for(lambda: len(rig.taken) == 5)
    assert rig.taken == [([10, 11, 12], False), ([13, 14], True), ([15], True), ([16, 17], True), ([20], False)]
    told = rig.told()
    assert (rig.of_streams("received"), rig.of_streams("lost")) == ({"body": 9}, {"body": 2})
    about = told["streams"]["body"]
    assert (about["duplicates"], about["gaps"], about["missed"], about["behind"]) == (5, 1, 4, 0)
    assert (about["fetched"], about["asked"]) == (2, 1)
    poll_for(lambda: rig.intake.feeder.records == 9)


def test_an_extent_tells_of_a_tail_that_never_came(rig: Rig, poll_for: PollFor) -> None:
    rig.publish(batch_of(3))
    rig.send(Extent("body", "a", (0, 8)).to_message())
    poll_for(lambda: rig.asked)
    assert rig.asked == [Fetch("ppo", "body", "a", (3, 8))]


def test_who_waits_to_join_has_nothing_sent_that_would_pile_up(
    context: Context, hub: HubAddress, poll_for: PollFor
) -> None:
    hub_end = make_socket(context, zmq.XPUB, bind=hub.endpoint(Port.EXPERIENCE_OUT))
    me = Identity("ppo", "trainer")
    waiting = Intake(context, hub, me, lambda batch, continues: None, history=0, ask=lambda message: None)
    of_a_checkpoint = BodyStream(history=0)
    of_a_checkpoint.arrived(batch_of(1), live=True)
    waiting.restore({"body": of_a_checkpoint.state()})
    poll_for(lambda: waiting.link.statistics()["state"] == "up")
    assert not hub_end.poll(200)
    waiting.start()
    assert hub_end.poll(30_000)
    waiting.close()


def test_a_slow_buffer_does_not_make_it_deaf(rig: Rig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch) -> None:
    published, behind = threading.Event(), []

    def take_slowly(batch: RecordBatch, continues: bool) -> None:
        published.wait(30.0)
        time.sleep(0.05)
        behind.append(rig.told()["streams"]["body"]["behind"])
        rig._consume(batch, continues)

    monkeypatch.setattr(rig.intake.feeder, "_consume", take_slowly)
    for n in range(40):
        rig.publish(batch_of(1, first=n))
    rig.send(Extent("body", "a", (0, 40)).to_message())
    published.set()
    poll_for(lambda: len(rig.taken) == 40)
    assert max(behind) > 20
    assert not rig.asked


def test_what_comes_while_the_buffer_is_stuck_is_held_up_to_a_bound_and_else_fetched_later(
    rig: Rig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [batch_of(1, first=n) for n in range(200)]
    room = 10 * (batches[0].nbytes + limits.BATCH_OVERHEAD_BYTES)
    monkeypatch.setattr(limits, "UNTAKEN_BYTES", room)
    monkeypatch.setattr(limits, "AHEAD_BYTES", room)
    begun, ready = threading.Event(), threading.Event()

    def take_when_ready(batch: RecordBatch, continues: bool) -> None:
        begun.set()
        ready.wait(60.0)
        rig._consume(batch, continues)

    monkeypatch.setattr(rig.intake.feeder, "_consume", take_when_ready)
    rig.publish(batches[0])
    assert begun.wait(60.0)
    for batch in batches[1:]:
        rig.publish(batch)
    poll_for(lambda: rig.of_streams("postponed") == {"body": 200 - 1 - 20})
    assert rig.of_streams("behind") == {"body": 200 - 1}
    ready.set()
    answered = 0

    def all_fetched() -> bool:
        nonlocal answered
        for wish in rig.asked[answered:]:
            for batch in batches[slice(*wish.range)]:
                rig.send(replace(batch.to_message(), topic=fetched_topic("ppo")))
            rig.send(Fetched("body", "a", wish.range).to_message("ppo"))
            answered += 1
        return len(rig.taken) == 200

    poll_for(all_fetched)
    assert [numbers for numbers, _ in rig.taken] == [[n] for n in range(200)]
    assert rig.of_streams("lost") == {"body": 0}


def test_every_body_has_a_stream_of_its_own(rig: Rig, poll_for: PollFor) -> None:
    begin = time.monotonic()
    for body, age_s in (("a", 1.0), ("b", 60.0)):
        versions = {"policy_value": np.array([1, int(age_s)])}
        batch = replace(batch_of(2, first=5), body=body, times=np.full(2, time.time() - age_s), versions=versions)
        rig.publish(batch)
    rig.publish(replace(batch_of(1, first=7), body="a", times=np.array([time.time() - 5.0])))
    poll_for(lambda: len(rig.taken) == 3)
    assert sorted(rig.taken) == [([5, 6], False), ([5, 6], False), ([7], True)]
    assert rig.of_streams("received") == {"a": 3, "b": 2}
    ages, took_s = rig.of_streams("record_age_s"), time.monotonic() - begin
    assert ages["a"] == pytest.approx(5.0, abs=3.0 + took_s)
    assert ages["b"] == pytest.approx(60.0, abs=3.0 + took_s)
    assert rig.intake.newest_versions["b"] == {"policy_value": 60}


def test_more_bodies_than_a_system_has_are_refused(
    rig: Rig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_BODIES", 1)
    rig.publish(batch_of(1))
    poll_for(lambda: len(rig.taken) == 1)
    rig.publish(replace(batch_of(1), body="stranger"))
    poll_for(lambda: rig.told()["experience_wire_errors"] == 1)
    assert list(rig.of_streams("received")) == [batch_of(1).body]
    monkeypatch.setattr(limits, "BODY_IS_GONE", 0.0)
    rig.publish(replace(batch_of(1), body="stranger"))
    poll_for(lambda: list(rig.intake.state()) == ["stranger"])  # who is gone makes room
    poll_for(lambda: len(rig.taken) == 2)
    rig.publish(batch_of(1))
    rig.publish(batch_of(1, first=1))
    poll_for(lambda: len(rig.taken) == 3)
    assert [numbers for numbers, _ in rig.taken] == [[0], [0], [1]], "who comes back goes on where it stood"
    assert rig.of_streams("received") == {batch_of(1).body: 2}


def test_what_was_missed_of_a_body_that_is_forgotten_is_lost(
    rig: Rig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_BODIES", 1)
    monkeypatch.setattr(limits, "BODY_IS_GONE", 0.0)
    rig.publish(batch_of(1))
    rig.send(Extent("body", "a", (0, 5)).to_message())
    poll_for(lambda: rig.told()["streams"]["body"]["behind"] == 4 if rig.told()["streams"] else False)
    rig.publish(replace(batch_of(1), body="stranger"))
    poll_for(lambda: list(rig.of_streams("received")) == ["stranger"])
    rig.publish(replace(batch_of(1), incarnation="b"))
    poll_for(lambda: rig.of_streams("lost") == {"body": 4})
    rig.publish(replace(batch_of(1, first=4), incarnation="b"))
    poll_for(lambda: rig.told()["streams"]["body"]["behind"] == 4)
    rig.publish(replace(batch_of(1), body="stranger"))
    poll_for(lambda: list(rig.of_streams("received")) == ["stranger"])
    rig.publish(replace(batch_of(4, first=1), incarnation="b"))
    poll_for(lambda: rig.of_streams("received").get("body") == 6)
    assert rig.of_streams("lost") == {"body": 4}, "of a life that comes back nothing more"


def test_a_body_that_was_started_again_begins_anew(rig: Rig, poll_for: PollFor) -> None:
    rig.publish(batch_of(2, first=50))
    rig.publish(replace(batch_of(2, first=0), incarnation="b"))
    poll_for(lambda: len(rig.taken) == 2)
    assert rig.taken[1] == ([0, 1], False)
    assert rig.of_streams("lost") == {"body": 0}


def test_malformed_experience_is_counted_and_the_stream_goes_on(rig: Rig, poll_for: PollFor) -> None:
    topic = b"experience/body/"
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
    poll_for(lambda: rig.intake.malformed.count == len(junk))
    assert rig.told()["experience_wire_errors"] == len(junk)
    rig.publish(batch_of(1, first=1))
    poll_for(lambda: rig.taken)
    assert rig.taken == [([1], False)]


def test_records_that_do_not_fit_the_buffer_are_lost(rig: Rig, poll_for: PollFor) -> None:
    rig.publish(batch_of(2))
    rig.publish(batch_of(3, first=2, action=np.zeros(5, np.int64)))
    rig.publish(batch_of(1, first=5))
    poll_for(lambda: len(rig.taken) == 2)
    assert (rig.of_streams("received"), rig.of_streams("lost")) == ({"body": 3}, {"body": 3})
    poll_for(lambda: rig.intake.feeder.consumed == {"body": ("a", 6)})  # also what was refused is done with
    assert rig.intake.feeder.records == 3


def test_a_body_that_has_been_silent_is_no_longer_present_beside_one_that_is_heard(
    rig: Rig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, here = {"body": ("a", 2)}, {"second": ("b", 3)}
    rig.publish(batch_of(2))
    poll_for(lambda: rig.intake.present == left)
    monkeypatch.setattr(limits, "SILENT_BODY", 0.3)
    time.sleep(0.4)
    assert rig.intake.present == left, "nobody else is there: it may be starting again"
    second = replace(batch_of(3), body="second", incarnation="b")
    poll_for(lambda: rig.publish(second) or rig.intake.present == here)  # it is heard as long as it speaks
    rig.publish(batch_of(1, first=2))
    poll_for(lambda: rig.intake.feeder.consumed == {"body": ("a", 3), **here})
    assert rig.intake.present["body"] == ("a", 3)


@pytest.mark.parametrize("of", ["records", "places"])
def test_a_batch_that_is_malformed_each_time_it_is_sent_holds_nobody_up(rig: Rig, poll_for: PollFor, of: str) -> None:
    bad = replace(batch_of(2, first=2), times=np.array([1.0, np.nan])).to_message()
    bad = bad if of == "records" else Message("places", "body", "a", {"memory": [], "batches": []})
    rig.publish(batch_of(2))
    rig.send(bad)
    rig.publish(batch_of(2, first=4))
    answered = 0
    deadline = time.monotonic() + 60.0
    while len(rig.taken) < 2 and time.monotonic() < deadline:
        for _ in rig.asked[answered:]:
            answered += 1
            rig.send(replace(bad, topic=b"fetched/ppo/"))
            rig.send(Fetched("body", "a", (2, 4)).to_message("ppo"))
        time.sleep(0.02)
    assert rig.taken == [([0, 1], False), ([4, 5], False)]
    assert rig.of_streams("lost") == {"body": 2}
    assert answered == SPOILT_ANSWERS
    for n in range(100):
        rig.send(replace(bad, sender=f"nobody{n}", topic=b"fetched/ppo/"))
    rig.publish(batch_of(1, first=6))
    poll_for(lambda: len(rig.taken) == 3)
    assert len(rig.intake._spoilt) <= 1, "what strangers send is not remembered"


def test_what_others_send_malformed_costs_a_body_nothing_that_can_be_had(rig: Rig, poll_for: PollFor) -> None:
    rig.publish(batch_of(2))
    rig.publish(batch_of(2, first=4))
    bad = replace(batch_of(1), body="other", times=np.array([np.nan])).to_message()
    answered = 0
    deadline = time.monotonic() + 60.0
    while answered < 3 * SPOILT_ANSWERS and time.monotonic() < deadline:
        for _ in rig.asked[answered:]:
            answered += 1
            rig.send(bad)  # live, and under the topic of what was asked for
            rig.send(replace(bad, topic=b"fetched/ppo/"))
            rig.send(Fetched("body", "a", (2, 4)).to_message("ppo"))  # the records themselves were dropped on the way
        time.sleep(0.02)
    assert (answered, rig.of_streams("lost")["body"]) == (3 * SPOILT_ANSWERS, 0)
    rig.send(replace(batch_of(2, first=2).to_message(), topic=b"fetched/ppo/"))
    poll_for(lambda: len(rig.taken) == 3)
    assert rig.taken[1:] == [([2, 3], True), ([4, 5], True)]


def marked(body: str, first: int, count: int, cut: Cut | None = None) -> RecordBatch:
    return replace(batch_of(count, first=first), body=body, cut=cut)


def test_nothing_is_handed_on_beyond_a_cut_until_it_has_been_taken(rig: Rig, poll_for: PollFor) -> None:
    for name in ("one", "two", "three"):
        first, cut = rig.intake.feeder.records // 2, Cut(name, ("body", "other"))
        rig.publish(marked("body", first, 4))
        rig.publish(marked("body", first + 4, 4, cut))
        rig.publish(marked("other", first, 4))
        poll_for(lambda n=first: rig.intake.feeder.records == 2 * n + 8)
        assert rig.intake.feeder.cut is None
        rig.publish(marked("other", first + 4, 4, cut))
        poll_for(lambda c=cut: rig.intake.feeder.cut == c)
        kept = rig.intake.state()
        assert {body: kept[body]["frontier"] for body in kept} == {"body": first + 4, "other": first + 4}
        rig.intake.feeder.pass_cut(cut)
        rig.intake.feeder.pass_cut(cut)
        poll_for(lambda n=first: rig.intake.feeder.records == 2 * n + 16)
        assert rig.intake.feeder.cut is None
    assert all(continues for _, continues in rig.taken[2:])


def test_while_a_cut_is_taken_nothing_of_other_bodies_is_handed_on_either(rig: Rig, poll_for: PollFor) -> None:
    cut = Cut("one", ("body",))
    rig.publish(marked("other", 0, 2))
    rig.publish(marked("body", 0, 4))
    rig.publish(marked("body", 4, 4, cut))
    poll_for(lambda: rig.intake.feeder.cut == cut)
    rig.publish(marked("other", 2, 2))
    poll_for(lambda: rig.told()["streams"]["other"]["behind"] == 2)
    time.sleep(0.3)
    assert {body: kept["frontier"] for body, kept in rig.intake.state().items()} == {"other": 2, "body": 4}
    assert rig.intake.feeder.records == 6
    rig.intake.feeder.pass_cut(cut)
    poll_for(lambda: rig.intake.feeder.records == 12)


def test_a_cut_without_bodies_is_taken_where_the_trainer_stands(rig: Rig, poll_for: PollFor) -> None:
    rig.publish(marked("body", 0, 4))
    poll_for(lambda: rig.intake.feeder.records == 4)
    rig.intake.feeder.wish_cut(Cut("some", ("body",)))
    time.sleep(3 * POLL_MS / 1000)
    assert rig.intake.feeder.cut is None, "the stream will tell of it"
    rig.intake.feeder.wish_cut(Cut("none", ()))
    poll_for(lambda: rig.intake.feeder.cut)
    assert rig.intake.feeder.cut == Cut("none", ())
    rig.intake.feeder.pass_cut(Cut("none", ()))
    rig.publish(marked("body", 4, 4))
    poll_for(lambda: rig.intake.feeder.records == 8)


def test_a_body_that_stands_still_tells_of_its_cut_all_the_same(rig: Rig, poll_for: PollFor) -> None:
    cut = Cut("one", ("body",))
    rig.publish(marked("body", 0, 4))
    for _ in range(3):
        rig.send(Extent("body", "a", (0, 4), (cut, 4)).to_message())
    poll_for(lambda: rig.intake.feeder.cut == cut)
    rig.intake.feeder.pass_cut(cut)
    rig.send(Extent("body", "a", (0, 4), (cut, 4)).to_message())
    rig.publish(marked("body", 4, 1))
    poll_for(lambda: rig.intake.feeder.records == 5)
    assert rig.intake.feeder.cut is None


def test_a_cut_that_the_other_body_never_comes_to_is_passed_in_the_end(
    rig: Rig, poll_for: PollFor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "CUT_PATIENCE", 0.3)
    rig.publish(marked("body", 0, 4))
    rig.publish(marked("body", 4, 4, Cut("one", ("body", "gone"))))
    poll_for(lambda: rig.intake.feeder.records == 8)
    assert "came from gone" in caplog.text


def test_every_cut_has_the_whole_patience(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cuts the first is given up at its wisher; the second is not to inherit how long that was waited for."""
    monkeypatch.setattr(limits, "CUT_PATIENCE", 30.0)
    rig.intake.close()
    intake = rig.intake
    one, two = Cut("one", ("a", "b")), Cut("two", ("a", "b"))
    standing: dict[str, Cut | None] = {"a": None, "b": None}
    passed: list[str] = []

    class Stream:
        def __init__(self, body: str) -> None:
            self.body = body

        @property
        def at_cut(self) -> Cut | None:
            return standing[self.body]

        def pass_cut(self) -> None:
            passed.append(self.body)

    intake.feeder.streams = {body: Stream(body) for body in standing}  # type: ignore[misc]
    intake.feeder._standing_since = 0.0
    for now, of_a, of_b in [(0.0, one, None), (25.0, None, two), (31.0, None, two), (40.0, two, two)]:
        standing.update(a=of_a, b=of_b)  # the second wish moves the first body's mark on
        intake.feeder._look_for_cut(now)
    assert intake.feeder.cut == two
    assert not passed


def test_a_trainer_goes_on_behind_what_an_earlier_process_had_taken(
    rig: Rig, context: Context, hub: HubAddress, poll_for: PollFor
) -> None:
    rig.publish(marked("body", 0, 4))
    poll_for(lambda: rig.intake.feeder.records == 4)
    kept = rig.intake.state()
    rig.intake.close()
    second = Intake(context, hub, Identity("ppo", "trainer"), rig._consume, history=0, ask=rig._ask)
    second.restore(kept)
    second.start()
    try:
        poll_for(lambda: rig.publish(marked("body", 2, 6)) or second.feeder.records)
    finally:
        second.close()
    assert second.feeder.records == 4
    assert rig.taken[-1] == ([4, 5, 6, 7], True)
