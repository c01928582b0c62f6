from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ami_controller.cli.render import duration, number, render_status, troubles
from ami_controller.cli.up import describe_exit, summary
from ami_controller.cli.watch import History, main_metrics, picture, sparkline, watch
from ami_controller.registry import Member
from ami_controller.status import EXPECTED, FIGURES, OF_SENDING, OF_STREAMS, SNAPSHOT_COUNTERS, build_status
from ami_inference.experience import ExperienceSender
from ami_shared import wire
from ami_shared.bus import HubAddress
from ami_shared.errors import ConfigurationError
from ami_shared.membership import Identity
from ami_shared.models.receiver import ParameterReceiver
from ami_shared.models.replicas import Replicas
from ami_shared.wire import Message
from ami_trainer.frontier import BodyStream
from ami_trainer.publishing import SnapshotPublisher

BODY = {
    "uptime_s": 60.0, "steps": 600, "segment": 2, "late_ticks": 3, "skipped_ticks": 1, "rate_hz": 10.0,
    "tick_lateness_ms": {"p50": 0.1, "p95": 0.5, "p99": 1.25, "max": 9.0}, "memory_bytes": 400_000_000,
    "cpu_cores": 0.3, "published": 590, "overflowed": 0, "unsendable": 0, "unsent": 3,
    "retained": {"records": 590, "bytes": 9_000, "capacity_bytes": 10_000},
    "trouble": None, "wire_errors": 0, "snapshots_refused": 0, "snapshots_received": 9, "snapshots_from_memory": 8,
    "links": {"control": {"state": "up", "since_s": 60.0, "lost": 0}},
    "replicas": {"image_encoder": {"version": 11, "age_s": 0.5}}, "metrics_dropped": 0, "resent": 40,
    "environment": {"sensor": "camera 0"}, "agent": {"not_finite": 0}, "not_finite": 0, "blind_ticks": 0,
}  # fmt: skip
TRAINER = {
    "uptime_s": 59.0, "updates": 1_200, "rate_hz": 20.0, "threads": 9, "poisoned": 0,
    "streams": {
        "body": {"received": 588, "lost": 2, "behind": 4, "gaps": 1, "missed": 40, "fetched": 39, "asked": 3,
                 "record_age_s": 0.08, "intake_rate_hz": 10.0, "catch_up_hz": 0.0, "bytes_received": 12_000,
                 "records_from_memory": 580, "lost_from": 17, "lost_to": 19},
    },
    "losses": {"loss": 0.0123456}, "fresh_error": {"first": 0.1, "now": 0.02}, "memory_bytes": 900_000_000,
    "buffer": {"kind": "uniform", "fill": 588, "capacity": 2048, "seen": 588},
    "limiter": {"credit": 3.0, "forfeited": 2.0, "skipped": 0}, "experience_wire_errors": 0,
    "record_lag": {"body": {"image_encoder": 2}, "other": {"image_encoder": 40}},
    "models": {"image_encoder": {"version": 12, "age_s": 0.4, "bytes": 2_800_000}},
}  # fmt: skip
HUB = {
    "address": "127.0.0.1:5550", "uptime_s": 61.0, "launch": "", "run_dir": "/runs/x", "memory_bytes": 1,
    "wire_errors": 0,
    "checkpoint": {
        "newest": "2026-11-24_10-00-00", "age_s": 90.0, "bytes": 5_000_000, "made": 3, "saving": None, "trouble": None,
    },
    "snapshots_refused": 0, "snapshots_from_memory": 0, "snapshots_from_wire": 0, "snapshots_passed_over": 0,
    "snapshot_bytes_received": 0, "answers_dropped": 0, "keys_trouble": None,
    "parameters_trouble": None,
    "links_made": 8, "links_lost": 0, "handshakes_failed": 0,
    "security": "loopback only", "refused": {}, "ports": {"control": {"made": 8, "lost": 0, "failed": 0}},
}  # fmt: skip
TRACKER = {
    "state": "writing", "trouble": None, "queued": 0, "written": 5, "dropped": 0, "not_finite": 0,
    "mlflow_run": "abc", "uri": "sqlite:///x", "memory_bytes": 1,
}  # fmt: skip


def member(name: str, role: str, statistics: dict[str, Any], state: str = "running") -> Member:
    return Member(name, role, "here", 7, "1", b"1", 99.5, state, 0, statistics)


REAL_HUB = """
import json, os, sys, time
from ami_controller.service import Controller
from ami_shared.config import load_config
print(json.dumps(Controller(load_config(sys.argv[1:])).status(time.monotonic())), flush=True)
os._exit(0)
"""


def records_of_age(age_s: float) -> dict[str, Any]:
    return status({}, {"streams": {"body": {"record_age_s": age_s}}})


def status(body: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **hub: Any) -> dict[str, Any]:
    members = [
        member("image_vae", "trainer", TRAINER | (trainer or {})),
        member("body", "body", BODY | (body or {})),
    ]
    return build_status(
        "running", members, ["body", "image_vae", "ppo"], HUB | hub, TRACKER, {"image_encoder": 11}, now=100.0
    )


def test_a_status_tells_of_bodies_first_and_of_everybody_expected() -> None:
    services = status()["services"]
    assert [(s["name"], s["state"]) for s in services] == [
        ("body", "running"), ("image_vae", "running"), ("ppo", "absent"),
    ]  # fmt: skip


def test_a_service_s_numbers_are_those_it_reported() -> None:
    body, trainer, _ = status()["services"]
    assert {key: body[key] for key in ("steps", "late_ticks", "segment", "heartbeat_age_s", "rate_hz")} == {
        "steps": 600, "late_ticks": 3, "segment": 2, "heartbeat_age_s": 0.5, "rate_hz": 10.0,
    }  # fmt: skip
    assert trainer["steps"] == 1_200
    assert trainer["losses"] == {"loss": 0.0123456}


def test_malformed_messages_of_all_streams_are_added_up() -> None:
    body, trainer, _ = status({"wire_errors": 2, "snapshots_refused": 3}, {"experience_wire_errors": 4})["services"]
    assert (body["wire_errors"], trainer["wire_errors"]) == (5, 4)


def test_the_experience_stream_is_told_from_both_ends() -> None:
    (told,) = status()["experience"]
    assert (told["body"], told["published"], told["overflowed"], told["unsent"]) == ("body", 590, 0, 3)
    assert told["retained"] == {"records": 590, "bytes": 9_000, "capacity_bytes": 10_000}
    assert (told["received"], told["lost"]) == ({"image_vae": 588}, {"image_vae": 2})
    assert (told["behind"], told["missed"], told["gaps"]) == ({"image_vae": 4}, {"image_vae": 40}, {"image_vae": 1})
    assert (told["resent"], told["fetched"], told["asked"]) == (40, {"image_vae": 39}, {"image_vae": 3})
    assert told["duplicates"] == told["postponed"] == {"image_vae": 0}


def test_no_counter_of_the_streams_is_forgotten() -> None:
    sending = {counter: n for n, counter in enumerate(OF_SENDING, 1)}
    coming = {counter: n for n, counter in enumerate(OF_STREAMS, 101)}
    figures = {figure: float(n) for n, figure in enumerate(FIGURES, 201)}
    snapshots = {counter: n for n, counter in enumerate(SNAPSHOT_COUNTERS, 301)}
    made = status(sending | snapshots, {"streams": {"body": coming | figures}, **snapshots})
    (told,) = made["experience"]
    assert {counter: told[counter] for counter in OF_SENDING} == sending
    for counter, value in (coming | figures).items():
        assert told[counter] == {"image_vae": value}
    for service in made["services"][:2]:
        assert {counter: service[counter] for counter in SNAPSHOT_COUNTERS} == snapshots


def test_services_count_under_the_names_that_the_status_looks_for(
    context: zmq.Context[zmq.Socket[bytes]], hub: HubAddress
) -> None:
    me = Identity("image_vae", "trainer")
    sender = ExperienceSender(context, hub, "body", "1", 1 << 20)
    publisher = SnapshotPublisher(context, hub, me, {"m": torch.nn.Linear(1, 1)}, 1.0)
    receiver = ParameterReceiver(context, hub, Replicas({"m": torch.nn.Linear(1, 1)}), ["m"])
    assert set(OF_SENDING) <= sender.statistics().keys()
    stream = BodyStream(0)
    stream.record_age_s = 0.1
    assert {*OF_STREAMS, *FIGURES} <= stream.statistics(0.0).keys()
    assert set(SNAPSHOT_COUNTERS) <= publisher.counters().keys() | receiver.statistics().keys()


def test_the_memory_of_a_gpu_is_told_of_who_uses_one() -> None:
    body, trainer, _ = status({}, {"gpu_memory_bytes": 5_000})["services"]
    assert (body["gpu_memory_bytes"], trainer["gpu_memory_bytes"]) == (None, 5_000)


def test_a_model_s_newest_kept_and_used_versions_are_told() -> None:
    assert status()["models"] == [
        {"name": "image_encoder", "version": 12, "age_s": pytest.approx(0.9), "bytes": 2_800_000, "kept_version": 11,
         "used": {"body": 11}, "lag": {"body": 1}, "used_age_s": {"body": 0.5}}
    ]  # fmt: skip


def test_a_model_whose_trainer_is_gone_is_still_told() -> None:
    (model,) = build_status("running", [], [], HUB, TRACKER, {"image_encoder": 11}, 0.0)["models"]
    assert (model["version"], model["kept_version"], model["age_s"], model["used"]) == (11, 11, None, {})


def test_a_status_is_json_and_passes_the_wire() -> None:
    made = status()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    answer = Message("result", "controller", "c", {"status": made})
    assert wire.decode([bytes(frame) for frame in wire.encode(answer)]).fields["status"] == made


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"\w+", " ".join(rows)))
    made = status()
    told = {*made, *made["services"][0], *made["experience"][0], *made["models"][0]}
    assert told <= documented
    of_hub = {*made["hub"], *made["hub"]["checkpoint"], *made["tracker"]}
    assert {word for word in documented if not word.isdigit()} <= told | of_hub, "what is documented is told"


def test_every_key_of_a_real_hub_is_documented(tmp_path: Path, hub: HubAddress) -> None:
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text()
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", page))))
    command = [sys.executable, "-c", REAL_HUB, "experiment=noise", f"hub={hub}", f"run_dir={tmp_path}"]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert {*made, *made["hub"], *made["tracker"], *made["hub"]["checkpoint"]} <= documented
    assert made["hub"].keys() == HUB.keys(), "the made-up one of these tests has the same"
    assert made["tracker"].keys() == TRACKER.keys()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda v: (
        st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["body", "p99", "version", "fill"]), v, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*sorted(EXPECTED), "more"]), anything))
def test_statistics_of_any_form_give_a_status_that_can_be_shown_and_sent(told: dict[str, Any]) -> None:
    for role in ("body", "trainer"):
        made = build_status(
            "running", [member("a", role, told), member("body", "body", BODY)], [], HUB, TRACKER, {}, 0.0
        )
        json.dumps(made)
        show(made)
        summary(made)
        History().add(made)


def test_statistics_of_another_form_are_said_to_be() -> None:
    body, _, _ = status({"steps": "many", "replicas": {"image_encoder": 4}})["services"]
    assert body["trouble"] == "malformed statistics: steps, replicas"
    assert body["steps"] == 0
    assert body["late_ticks"] == 3


def show(made: dict[str, Any], width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_status(made))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_picture_of_a_status_shows_every_service_stream_and_model() -> None:
    text = show(status())
    for shown in ("AMI is running", "127.0.0.1:5550", "1m01s", "10.0/s", "3 of 600", "1.2 ms", "588/2048", "0.01235",
                  "0.1 → 0.02", "credit", "forfeited", "400 MB", "0.5 s", "590", "588", "2.8 MB", "body v11",
                  "ppo is absent"):  # fmt: skip
        assert shown in text, shown
    assert "skipped" not in text
    for service in ("body", "image_vae", "ppo"):
        assert re.search(rf"^{service}\b", text, re.MULTILINE)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_narrow_screen_costs_columns_rather_than_digits(width: int) -> None:
    text = show(status(), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for shown in ("body", "10.0/s", "588", "v11"):
        assert shown in text, shown


def test_troubles_stand_where_a_low_screen_shows_them_too() -> None:
    lines = show(status({"trouble": "camera 0 is lost"})).splitlines()
    assert lines[1] == "! body: camera 0 is lost"


@pytest.mark.parametrize(("height", "sparklines"), [(10, False), (24, True)])
def test_watching_fills_the_screen_and_no_more(height: int, sparklines: bool) -> None:
    console, history = Console(width=120, height=height, file=io.StringIO()), History()
    history.add(status())
    shown = console.render_lines(picture(status(), history, console))
    if sparklines:
        assert len(shown) <= height
    assert any("▁" in segment.text for line in shown for segment in line) is sparklines


def test_watching_takes_a_terminal() -> None:
    with pytest.raises(ConfigurationError, match="`ami watch` needs a terminal"):
        watch(HubAddress.parse("127.0.0.1:1"))


def test_a_system_at_rest_has_no_troubles() -> None:
    nothing_lost = TRAINER | {"streams": {"body": {"received": 588}}}
    members = [member("body", "body", BODY), member("image_vae", "trainer", nothing_lost)]
    assert troubles(build_status("running", members, [], HUB, TRACKER, {}, 0.0)) == []


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (status({"trouble": "camera 0 is lost"}), "body: camera 0 is lost"),
        (status(), "ppo is absent"),
        (status({"wire_errors": 4}), "body: 4 malformed messages dropped"),
        (status({"loop_age_s": 95.0}), "body: its loop has not moved for 1m35s"),
        (status(), "image_vae lost 2 records of body"),
        (status({"not_finite": 2, "agent": {"not_finite": 1}}), "body: 3 times what it observed or computed"),
        (status({"messages_dropped": 5}), "body: 5 messages to the controller dropped"),
        (status({"metrics_dropped": 6}), "body: 6 metrics dropped"),
        (status({"unsendable": 7}), "body: 7 records cannot be sent"),
        (status({}, {"limiter": {"skipped": 7, "restored": 0}}), "image_vae: 7 gradient steps skipped"),
        (status({}, {"limiter": {"skipped": 10, "restored": 1}}), "image_vae: 1 times back to the last good"),
        (status({}, {"poisoned": 2}), "image_vae: 2 snapshots not published"),
        (records_of_age(30.0), "records of body reach image_vae +30 s after they were made"),
        (records_of_age(-3.0), "records of body reach image_vae -3 s after they were made"),
        (status(answers_dropped=3), "hub: 3 answers dropped"),
        (status(wire_errors=1, snapshots_refused=2), "hub: 3 malformed messages dropped"),
        (status(handshakes_failed=5), "hub: connections that failed in the handshake: 5"),
        (status(security="INSECURE"), "hub: INSECURE"),
        (status(refused={"messages": 2, "connections": 7}), "hub: refused 7 connections, 2 messages"),
        (status({"clock": {"offset_s": 3.2, "doubt_s": 0.001}}), "body: clock of here is -3.2 s off: allowed for"),
        ({**status(), "tracker": TRACKER | {"trouble": "MLflow is down", "queued": 9}},
         "tracker: MLflow is down; 9 points wait"),
        ({**status(), "tracker": TRACKER | {"dropped": 3}}, "tracker: 3 points dropped"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_every_trouble_is_a_line(made: dict[str, Any], line: str) -> None:
    assert any(line in told for told in troubles(made)), troubles(made)
    assert line in show(made)


def test_a_lost_service_is_a_trouble() -> None:
    made = build_status("running", [member("body", "body", BODY, "lost")], [], HUB, TRACKER, {}, 0.0)
    assert troubles(made) == ["body is lost"]


def test_what_a_member_calls_itself_is_shown_as_it_is() -> None:
    odd = member("body", "body", BODY | {"trouble": "[bold]camera[/red]"})
    odd.host = "[red]host[/blue]"
    text = show(build_status("running", [odd], [], HUB, TRACKER, {}, 0.0))
    assert "[red]host[/blue]" in text
    assert "[bold]camera[/red]" in text


def test_the_summary_is_one_line_of_everything() -> None:
    line = summary(status())
    for told in ("running", "body 10.0 steps/s, 3 late", "image_vae 20.0 updates/s, fresh error 0.1 → 0.02",
                 "ppo absent", "image_encoder v12", "up 1m01s"):  # fmt: skip
        assert told in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (200, "3m20s"), (3_599, "59m59s"), (14_700, "4h05m"), (183_600, "2d03h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.0, "0"), (0.0123456, "0.01235"), (12_345.6, "1.235e+04"), (float("nan"), "nan")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 1.0], "▁█"),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([-8.0, 0.0, 8.0], "▁▅█"),
        ([1.0, float("nan"), 2.0], "▁!█"),
        ([-1.7e308, 1.7e308], "▁█"),
    ],
)
def test_a_sparkline_spans_from_the_least_to_the_greatest(values: list[float], line: str) -> None:
    assert sparkline(values) == line


@given(st.lists(st.floats() | st.just(np.inf)))
def test_a_sparkline_has_a_bar_for_every_value(values: list[float]) -> None:
    assert len(sparkline(values)) == len(values)


def test_the_main_metrics_are_those_of_living_services() -> None:
    names = [name for name, _ in main_metrics(status())]
    assert names == [
        "body rate /s", "body p99 late ms", "image_vae rate /s", "image_vae fresh error", "image_vae loss",
    ]  # fmt: skip


def test_an_exit_code_is_told_in_words() -> None:
    assert describe_exit(1) == "ended with exit code 1"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-250) == "ended with exit code -250"
    assert describe_exit(143) == "was ended by SIGTERM"
    assert describe_exit(200) == "ended with exit code 200"


def test_a_link_that_is_down_is_said() -> None:
    down = {"state": "down", "since_s": 4.0, "lost": 2}
    links = {"control": {"state": "up", "since_s": 9.0, "lost": 0}, "experience": down, "parameters": down}
    told = status(body={"links": links})
    assert "body: no link to the hub for experience and parameters: reconnecting" in troubles(told)
    assert not [line for line in troubles(status()) if "no link" in line]


def test_lags_and_ages_of_both_streams_are_told() -> None:
    told = status()
    (model,) = told["models"]
    assert (model["lag"], model["used_age_s"]) == ({"body": 1}, {"body": 0.5})
    (stream,) = told["experience"]
    assert stream["record_lag"] == {"image_vae": {"image_encoder": 2}}
    assert stream["record_age_s"] == {"image_vae": 0.08}
    behind = status(body={"replicas": {"image_encoder": {"version": 5, "age_s": 7.0}}})
    assert "body v5 (7 behind)" in show(behind)
