"""The control link against a real router in this process."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from ami_shared import limits, wire
from ami_shared.bus import HubAddress, Port, make_socket
from ami_shared.control import ControlLink, Hooks
from ami_shared.errors import DeadlineError, JoinRefusedError
from ami_shared.gate import Desired, Gate
from ami_shared.health import health_path
from ami_shared.membership import Identity
from ami_shared.metrics import MetricsQueue, Picture
from ami_shared.wire import Message

Context = zmq.Context[zmq.Socket[bytes]]
PATIENCE_S = 30
WISH = {"desired": Desired(epoch=3).to_fields(), "versions": {"m": 5}, "version_floors": {"m": 7}}


class Rig:
    """A link and the router that it talks to, which says only what the test lets it say."""

    def __init__(self, context: Context, hub: HubAddress) -> None:
        self.router = make_socket(context, zmq.ROUTER, bind=hub.endpoint(Port.CONTROL))
        self.gate, self.metrics = Gate(), MetricsQueue()
        self.messages: list[Message] = []
        self.versions: list[dict[str, int]] = []
        hooks = Hooks(lambda: {"steps": 4}, self.messages.append, lambda newest: self.versions.append(dict(newest)))
        self.identity = Identity("body", "body")
        self.health_path = health_path(hub.port, "body", "body")
        self.link = ControlLink(context, hub, self.identity, self.gate, self.metrics, hooks)
        self.link.start()

    def hear(self, *kinds: str) -> Message:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.router.poll(PATIENCE_S * 1_000):
            peer, *frames = self.router.recv_multipart()
            assert peer == self.identity.routing_id
            message = wire.decode(frames)
            if message.kind in kinds or not kinds:
                return message
        raise AssertionError(f"nothing of {kinds} came")

    def say(self, kind: str, **fields: Any) -> None:
        self.send(wire.encode(Message(kind, "controller", "c", fields)))

    def send(self, frames: list[Any]) -> None:
        self.router.send_multipart([self.identity.routing_id, *frames])

    def join(self) -> None:
        self.hear("join")
        self.say("joined", **WISH)
        assert self.link.wait_joined(PATIENCE_S)


@pytest.fixture
def rig(context: Context, hub: HubAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(limits, "SERVICE_TIMEOUT", 600.0)
    made = Rig(context, hub)
    yield made
    made.link.leave()
    made.link.join(PATIENCE_S)
    assert not made.link.is_alive()


def test_a_service_joins_and_hears_wish_and_versions(rig: Rig) -> None:
    rig.join()
    assert rig.gate.desired == Desired(epoch=3)
    assert rig.link.versions == {"m": 5}
    assert rig.link.version_floors == {"m": 7}
    assert rig.versions[0] == {"m": 5}
    assert rig.link.linked


def test_a_confirmation_leaves_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.join()
    monkeypatch.setattr(limits, "SERVICE_HEARTBEAT", 60.0)
    rig.hear("heartbeat")
    rig.gate.confirm("paused", rig.gate.desired)
    while (message := rig.hear("heartbeat")).fields["state"] != "paused":
        pass  # one may have been on its way
    assert (message.fields["state"], message.fields["epoch"]) == ("paused", 3)
    assert message.fields["statistics"]["steps"] == 4


def test_metrics_and_pictures_wait_until_somebody_answers(rig: Rig) -> None:
    rig.metrics.put(1, {"loss": 0.5})
    rig.metrics.put_picture(Picture("view", 1, np.zeros((2, 2, 3), np.uint8)))
    assert rig.hear().kind == "join"
    assert rig.hear().kind == "join"
    rig.say("joined", **WISH)
    assert rig.hear("metrics", "picture").fields["points"][0][:3] == ["loss", 0.5, 1]
    assert rig.hear("picture").arrays["pixels"].shape == (2, 2, 3)


def test_what_the_heartbeat_tells_becomes_curves(rig: Rig) -> None:
    rig.join()
    points = {name: (value, step) for name, value, step, _ in rig.hear("metrics").fields["points"]}
    assert points["steps"] == (4.0, 4)
    assert points["wire_errors"] == points["messages_dropped"] == points["metrics_dropped"] == (0.0, 4)
    assert "loop_age_s" not in points


def test_the_heartbeat_tells_how_long_the_loop_has_not_moved(rig: Rig) -> None:
    rig.join()
    assert rig.hear("heartbeat").fields["statistics"]["loop_age_s"] < 30.0
    rig.link._hooks.loop_moved_at = lambda: time.monotonic() - 70.0
    while rig.hear("heartbeat").fields["statistics"]["loop_age_s"] < 60.0:
        pass


def test_messages_that_do_not_fit_the_outbox_are_counted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.join()
    stuck, freed = threading.Event(), threading.Event()
    monkeypatch.setattr(rig.link, "_transmit", lambda message: (stuck.set(), freed.wait(60.0)))
    assert stuck.wait(PATIENCE_S)
    for _ in range(limits.CONTROL_QUEUE + 8):
        rig.link.send(rig.identity.message("leave"))
    assert rig.link.unsaid == 8
    freed.set()


def test_a_message_that_the_hub_would_cut_the_link_for_is_not_sent(rig: Rig, poll_for: Callable[..., Any]) -> None:
    rig.join()
    huge = {"n": np.zeros(limits.MAX_CONTROL_FRAME_BYTES + 1, np.uint8)}
    rig.link.send(Message("part", "body", "1", {}, huge))
    poll_for(lambda: rig.link.malformed.count == 1)
    assert rig.hear("heartbeat").kind == "heartbeat"


def test_malformed_messages_are_counted_and_the_link_lives_on(rig: Rig, poll_for: Callable[..., Any]) -> None:
    rig.join()
    for frames in ([b""], [b"", b"\xc1"], [b"", b"\x80", b"junk"]):
        rig.send(frames)
    rig.say("wish")  # without its fields
    poll_for(lambda: rig.link.malformed.count == 4)
    assert rig.hear("heartbeat").kind == "heartbeat"
    poll_for(lambda: rig.hear("heartbeat").fields["statistics"]["wire_errors"] == 4)


def test_a_refusal_closes_the_gate_and_is_raised(rig: Rig, poll_for: Callable[..., Any]) -> None:
    rig.hear("join")
    rig.say("refused", reason="another configuration", retry=False)
    poll_for(lambda: rig.gate.stopping)
    assert rig.link.refused
    with pytest.raises(JoinRefusedError, match="another configuration"):
        rig.link.raise_if_refused()


def test_waiting_for_the_controller_ends_with_the_gate(rig: Rig) -> None:
    rig.gate.stop()
    assert not rig.link.wait_joined()


def test_waiting_for_the_controller_ends_with_the_timeout(rig: Rig) -> None:
    with pytest.raises(DeadlineError, match=r"no controller answered at 127\.0\.0\.1"):
        rig.link.wait_joined(0.1)


def test_other_messages_go_to_the_service_and_its_own_to_the_controller_at_once(
    rig: Rig, poll_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.join()
    monkeypatch.setattr(limits, "SERVICE_HEARTBEAT", 60.0)
    rig.hear("heartbeat")
    rig.say("snapshot", model="m")
    poll_for(lambda: [m.fields for m in rig.messages] == [{"model": "m"}])
    rig.link.send(rig.identity.message("get_parameters", {"model": "m"}))
    assert rig.hear("get_parameters").fields == {"model": "m"}


def test_what_cannot_be_packed_does_not_end_the_link(rig: Rig) -> None:
    rig.join()
    rig.link.send(rig.identity.message("get_parameters", {"model": object()}))
    assert rig.hear("heartbeat").kind == "heartbeat"
    assert rig.hear("heartbeat").kind == "heartbeat"
    assert rig.link.is_alive()


def test_a_service_that_ends_says_goodbye_and_takes_its_health_file_along(
    rig: Rig, poll_for: Callable[..., Any]
) -> None:
    rig.join()
    poll_for(rig.health_path.is_file)
    assert json.loads(rig.health_path.read_text())["state"] == "starting"
    rig.link.leave()
    assert rig.hear("leave").sender == "body"
    assert not rig.health_path.exists()


def test_a_service_that_was_refused_does_not_say_goodbye(rig: Rig, poll_for: Callable[..., Any]) -> None:
    rig.hear("join")
    rig.say("refused", reason="no", retry=False)
    poll_for(lambda: rig.link.refused)
    rig.link.leave()
    while rig.router.poll(100):
        assert wire.decode(rig.router.recv_multipart()[1:]).kind == "join"


def test_reports_do_not_pile_up_for_a_controller_that_is_away(rig: Rig, poll_for: Callable[..., Any]) -> None:
    rig.join()
    endpoint = rig.router.last_endpoint
    rig.router.close(linger=0)
    poll_for(lambda: not rig.link.link.up)
    time.sleep(8 * limits.SERVICE_HEARTBEAT)
    back_at = time.time()
    rig.router = make_socket(rig.router.context, zmq.ROUTER, bind=endpoint.rstrip(b"\0").decode())
    waited = 0
    while rig.hear("heartbeat").fields["asked"] < back_at:
        waited += 1
    assert waited <= 2, "one waits, and one more may have been due just as the controller went away"
    assert rig.link.unsaid == 0
