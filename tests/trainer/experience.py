"""Records of bodies that act, for the tests of buffers and trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ami_shared.records import Ending, Record, RecordBatch
from ami_shared.wire import Array


def acted(n: int, **data: Any) -> dict[str, Array]:
    """What an agent with a vector of two numbers and one action of three choices leaves of step n."""
    usual: dict[str, Any] = {
        "observation": np.array([n, -n], np.float32),
        "action": np.array([n % 3], np.int64),
        "log_prob": np.asarray(np.log(1 / 3), np.float32),
        "value": np.asarray(0.0, np.float32),
        "reward": np.asarray(float(n), np.float32),
        "rewarded": np.asarray(n > 0),
    }
    return {**usual, **data}


def record(n: int, segment: int = 0, ending: Ending = Ending.NONE, version: int = 1, **data: Any) -> Record:
    return Record(segment, n, 0.0, 0.0, {"policy_value": version}, acted(n, **data), ending)


def batches(records: Sequence[Record], cuts: Sequence[int] = (), body: str = "body") -> list[RecordBatch]:
    """Cut a stream of records into batches at the given places."""
    edges = [0, *sorted({c for c in cuts if 0 < c < len(records)}), len(records)]
    return [RecordBatch.stack(body, f"{body} lives", records[a:b]) for a, b in pairwise(edges) if a < b]


def equal(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
