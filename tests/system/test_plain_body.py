"""The independent body of examples/, which shares no code with the project, among real services."""

from __future__ import annotations

import ast
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from processes import Process, System, poll_for, unchanged

from ami_shared import wire
from ami_shared.bus import HubAddress
from ami_shared.experience import Extent, Fetched
from ami_shared.records import RecordBatch
from ami_shared.wire import Message

PLAIN_BODY = Path(__file__).parents[2] / "examples" / "plain_body.py"


def start_plain_body(system: System) -> Process:
    command = [sys.executable, str(PLAIN_BODY), "--hub", str(system.hub)]
    process = Process("plain_body", command, system.folder / f"plain_body-{len(system.processes)}.log")
    system.processes.append(process)
    return process


def stream(system: System) -> dict[str, Any]:
    """What is known of the body's records."""
    streams = {about["body"]: about for about in system.status()["experience"]}
    return streams.get("body", {"published": 0, "received": {}, "lost": {}})


@pytest.fixture
def plain_body(hub: HubAddress, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A body of the smallest frames and with a small ring, with nobody there."""
    monkeypatch.syspath_prepend(PLAIN_BODY.parent)
    module = import_module("plain_body")
    monkeypatch.setattr(module, "RETAINED_BYTES", 20_000)
    body = module.PlainBody(hub.host, hub.port, "body")
    body.height = body.width = module.SQUARE
    body.y = body.x = 0
    body.action = [0, 0]
    yield body
    body.control.close(linger=0)
    body.experience.close(linger=0)


def test_it_needs_nothing_of_the_project() -> None:
    imports = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
        for node in ast.walk(ast.parse(PLAIN_BODY.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imports - set(sys.stdlib_module_names) == {"zmq", "msgpack"}


def test_it_retains_as_much_after_many_records_as_after_few(plain_body: Any) -> None:
    for _ in range(2_000):
        plain_body.publish(plain_body.see(), 0.0)
    assert plain_body.retained_bytes == sum(len(frame) for _, frames in plain_body.retained for frame in frames)
    assert 10_000 < plain_body.retained_bytes <= 20_000


def test_it_never_waits_for_a_controller_that_is_away(plain_body: Any) -> None:
    plain_body.joined = True
    reporting = threading.Thread(target=lambda: [plain_body.report() for _ in range(3_000)], daemon=True)
    reporting.start()  # heartbeats of 25 minutes
    reporting.join(60.0)
    assert not reporting.is_alive()


def test_it_says_what_is_gone_before_it_sends_what_is_left(plain_body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(100):
        plain_body.publish(plain_body.see(), 0.0)
    sent: list[Message] = []
    monkeypatch.setattr(plain_body.experience, "send_multipart", lambda frames: sent.append(wire.decode(frames)))
    plain_body.answer("image_vae", {"incarnation": plain_body.incarnation, "range": [0, 100]})
    oldest = 100 - len(plain_body.retained)
    assert oldest > 0
    assert Extent.from_message(sent[0]).range == (oldest, 100)
    assert [RecordBatch.from_message(message).first_sequence for message in sent[1:-1]] == list(range(oldest, 100))
    ending = Fetched.from_message(sent[-1])
    assert (ending.range, ending.gone) == ((0, 100), ((0, oldest),))


def test_it_dates_by_the_hub_s_clock(plain_body: Any) -> None:
    plain_body.set_clock(asked=100.0, hub_time=400.5, answered=101.0)
    plain_body.set_clock(asked=200.0, hub_time=509.0, answered=208.0)  # a slow answer says less
    assert plain_body.clock_ahead_s == 300.0
    plain_body.publish(plain_body.see(), 0.0)
    batch = RecordBatch.from_message(wire.decode([b"", *plain_body.retained[0][1]]))
    assert float(batch.times[0]) == pytest.approx(time.time() + 300.0, abs=5.0)


def test_it_lives_pauses_and_is_learned_from(make_system: Callable[..., System]) -> None:
    system = make_system("experiment=noise")
    controller = system.start("controller")
    trainer = system.start("image_vae")
    body = start_plain_body(system)
    system.wait_running()
    poll_for(lambda: system.model()["version"] >= 2, 30.0, "an encoder that learned from it")

    system.command("pause")
    stands_at = unchanged(lambda: stream(system)["published"])
    system.command("resume")
    poll_for(lambda: stream(system)["published"] > stands_at, what="records after the pause")

    system.command("save", "--wait")

    trainer.kill()
    poll_for(lambda: stream(system)["published"] > stands_at + 20, what="records that nobody took")
    system.start("image_vae")
    poll_for(lambda: stream(system)["received"].get("image_vae", 0) >= stands_at + 20, what="the past, fetched")
    assert stream(system)["lost"]["image_vae"] == 0

    controller.kill()
    system.start("controller")
    system.wait_running()
    lived = stream(system)["published"]
    assert lived > stands_at + 20
    poll_for(lambda: stream(system)["published"] > lived, what="records under the new controller")
    assert stream(system)["lost"]["image_vae"] == 0

    assert system.ami("shutdown").returncode == 0
    assert body.exit_code() == 0, body.output


def test_it_says_why_it_cannot_take_part(make_system: Callable[..., System]) -> None:
    system = make_system("experiment=noise", "pace=free")
    system.start("controller")
    body = start_plain_body(system)
    assert body.exit_code() == 1
    assert "pace is free" in body.output
    assert "Traceback" not in body.output
