from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ami_controller.state import RunState, load_state, save_state, save_versions
from ami_shared.errors import ConfigurationError

STATE = RunState(paused=True, epoch=7, versions={"image_encoder": 12}, mlflow_run="abc")


def test_a_state_survives(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    assert load_state(tmp_path) == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_new_run_begins_fresh(tmp_path: Path) -> None:
    fresh, another = load_state(tmp_path), load_state(tmp_path)
    assert fresh == RunState(False, 0, {}, None, lineage=fresh.lineage)
    assert fresh.lineage != another.lineage


def test_the_newest_state_counts(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    newer = RunState(epoch=8)
    save_state(tmp_path, newer)
    assert load_state(tmp_path) == newer


def test_versions_are_kept_beside_it_and_a_power_cut_that_spoils_them_costs_nothing_else(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    save_versions(tmp_path, RunState(versions={"image_encoder": 20, "policy_value": 3}))
    assert load_state(tmp_path).versions == {"image_encoder": 20, "policy_value": 3}
    save_versions(tmp_path, RunState(versions={"image_encoder": 5}))
    assert load_state(tmp_path).versions == {"image_encoder": 12}, "versions never go back"
    for spoilt in ("", "\0" * 40, "[]", '{"image_encoder": "7"}'):
        (tmp_path / "versions.json").write_text(spoilt)
        assert load_state(tmp_path) == STATE


def test_a_state_from_before_there_were_lineages_has_one_from_now_on(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({k: v for k, v in asdict(STATE).items() if k != "lineage"}))
    assert load_state(tmp_path).lineage


def test_what_a_crash_left_beside_it_does_not_matter(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    (tmp_path / "state.123.tmp").write_text('{"pau')
    assert load_state(tmp_path) == STATE


def changed(**fields: Any) -> str:
    return json.dumps(asdict(STATE) | fields)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "5", "\x00" * 80, changed(more=1), changed(versions=[1]), changed(versions={"m": "1"}),
     changed(epoch="7"), changed(epoch=True), changed(paused="yes"), changed(mlflow_run=5), changed(lineage=5),
     json.dumps({k: v for k, v in asdict(STATE).items() if k != "epoch"})],
)  # fmt: skip
def test_a_broken_state_is_a_clear_error_and_stays_where_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="move it away: the run then continues") as caught:
        load_state(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_a_run_that_begins_with_another_s_checkpoint_has_made_none_itself() -> None:
    other = RunState(paused=True, epoch=4, versions={"m": 7}, mlflow_run="theirs", last_checkpoint=7)
    begun = other.for_another_run()
    assert (begun.mlflow_run, begun.last_checkpoint, begun.versions, begun.paused) == (None, 0, {"m": 7}, True)
    begun.versions["m"] = 8
    assert other.versions == {"m": 7}
