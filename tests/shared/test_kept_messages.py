"""Messages of protocol version 1, kept as they were first sent: they must be read for as long as that version lives."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ami_shared import wire
from ami_shared.experience import Extent, Fetch, Fetched
from ami_shared.records import Ending, RecordBatch
from ami_shared.settled import Settled
from ami_shared.snapshots import Snapshot
from ami_shared.wire import Array, Message

KEPT: dict[str, dict[str, Any]] = {
    kept["type"]: kept for kept in json.loads((Path(__file__).parent / "kept_messages_1.json").read_text())
}


def decoded(kind: str) -> Message:
    return wire.decode([base64.b64decode(frame) for frame in KEPT[kind]["frames"]])


def values(array: Array) -> Any:
    return (np.stack([array.real, array.imag], -1) if array.dtype.kind == "c" else array).tolist()


@pytest.mark.parametrize("kind", KEPT)
def test_a_kept_message_means_what_it_meant(kind: str) -> None:
    kept, got = KEPT[kind], decoded(kind)
    assert (got.kind, got.sender, got.incarnation) == (kept["type"], kept["from"], kept["inc"])
    assert (got.topic.decode(), got.fields) == (kept["topic"], kept["fields"])
    assert {name: [array.dtype.name, values(array)] for name, array in got.arrays.items()} == kept["arrays"]


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_sent_now_is_what_was_sent_then(kind: str) -> None:
    assert [bytes(frame) for frame in wire.encode(decoded(kind))] == [
        base64.b64decode(frame) for frame in KEPT[kind]["frames"]
    ]


def test_records_are_read() -> None:
    batch = RecordBatch.from_message(decoded("records"))
    assert (batch.body, batch.first_sequence, len(batch)) == ("kept_body", 40, 3)
    assert batch.endings.tolist() == [0, 0, Ending.TRUNCATED]
    assert batch.versions["policy_value"].tolist() == [7, 7, 7]
    assert batch.data["observation"].shape == (3, 3, 2, 2)


def test_what_is_said_about_records_is_read() -> None:
    assert Extent.from_message(decoded("extent")).range == (10, 43)
    assert Fetch.from_message(decoded("fetch")).range == (12, 20)
    assert Fetched.from_message(decoded("fetched")).gone == ((12, 13),)


def test_a_snapshot_is_read_and_its_digest_fits() -> None:
    snapshot = Snapshot.from_message(decoded("snapshot"))
    assert (snapshot.model, snapshot.version, list(snapshot.arrays)) == ("kept_model", 12, ["weight", "bias", "half"])


def test_a_notice_of_lockstep_is_read() -> None:
    assert Settled.from_message(decoded("settled")).versions == {"kept_model": 12}
