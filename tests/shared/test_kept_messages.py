"""Messages of every protocol version, kept as they were first sent: they must be read for ever."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ami_shared import limits, wire
from ami_shared.experience import Extent, Fetch, Fetched, Place, Places
from ami_shared.records import Ending, RecordBatch
from ami_shared.settled import Settled
from ami_shared.snapshots import Notice, Snapshot
from ami_shared.wire import Array, Message


def kept_messages(version: int) -> dict[str, dict[str, Any]]:
    path = Path(__file__).parent / f"kept_messages_{version}.json"
    return {kept["type"]: kept for kept in json.loads(path.read_text())}


ALL = {version: kept_messages(version) for version in limits.PROTOCOL_VERSIONS}
NEWEST = ALL[limits.PROTOCOL_VERSION]
every_version = pytest.mark.parametrize("kept", ALL.values(), ids=map(str, ALL))
every_message = pytest.mark.parametrize(
    "message", [pytest.param(m, id=f"{version}-{kind}") for version, kept in ALL.items() for kind, m in kept.items()]
)


def decoded(message: dict[str, Any]) -> Message:
    return wire.decode([base64.b64decode(frame) for frame in message["frames"]])


def values(array: Array) -> Any:
    return (np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array).tolist()


@every_message
def test_a_kept_message_means_what_it_meant(message: dict[str, Any]) -> None:
    got = decoded(message)
    assert (got.kind, got.sender, got.incarnation) == (message["type"], message["from"], message["inc"])
    assert (got.topic.decode(), got.fields) == (message["topic"], message["fields"])
    assert {name: [array.dtype.name, values(array)] for name, array in got.arrays.items()} == message["arrays"]


@pytest.mark.parametrize("kind", NEWEST)
def test_what_is_sent_now_is_what_was_sent_then(kind: str) -> None:
    frames = [base64.b64decode(frame) for frame in NEWEST[kind]["frames"]]
    assert [bytes(frame) for frame in wire.encode(decoded(NEWEST[kind]))] == frames


@every_version
def test_records_are_read(kept: dict[str, Any]) -> None:
    batch = RecordBatch.from_message(decoded(kept["records"]))
    assert (batch.body, batch.first_sequence, len(batch)) == ("kept_body", 40, 3)
    assert batch.endings.tolist() == [0, 0, Ending.TRUNCATED]
    assert batch.versions["policy_value"].tolist() == [7, 7, 7]
    assert batch.data["observation"].shape == (3, 3, 2, 2)


@every_version
def test_what_is_said_about_records_is_read(kept: dict[str, Any]) -> None:
    assert Extent.from_message(decoded(kept["extent"])).range == (10, 43)
    assert Fetch.from_message(decoded(kept["fetch"])).range == (12, 20)
    assert Fetched.from_message(decoded(kept["fetched"])).gone == ((12, 13),)


def test_places_are_read() -> None:
    assert Places.from_message(decoded(NEWEST["places"])).batches == (Place((40, 43), ((128, 20), (192, 72))),)


@every_version
def test_a_snapshot_is_read_and_its_digest_fits(kept: dict[str, Any]) -> None:
    snapshot = Snapshot.from_message(decoded(kept["snapshot"]))
    assert (snapshot.model, snapshot.version, list(snapshot.arrays)) == ("kept_model", 12, ["weight", "bias", "half"])


@every_version
def test_a_notice_of_lockstep_is_read(kept: dict[str, Any]) -> None:
    assert Settled.from_message(decoded(kept["settled"])).versions == {"kept_model": 12}


def test_a_notice_of_a_snapshot_is_read() -> None:
    notice = Notice.from_message(decoded(NEWEST["notice"]))
    assert notice.reference is not None
    assert (notice.reference.pid, notice.reference.nbytes) == (4321, 128)
    assert notice.layout.entries == (("weight", "float32", (2, 3), 0), ("steps", "int64", (), 64))
