from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ami_shared import wire
from ami_shared.errors import WireError
from ami_shared.settled import TOPIC, Settled

NOTICE = Settled("ppo", {"body's incarnation": 256, "another": 0}, {"policy_value": 7})


def test_a_notice_arrives_as_it_was_sent() -> None:
    frames = [bytes(frame) for frame in wire.encode(NOTICE.to_message("abc"))]
    assert frames[0].startswith(TOPIC)
    message = wire.decode(frames)
    assert message.incarnation == "abc"
    assert Settled.from_message(message) == NOTICE


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"frontiers": {}},
        {"frontiers": [], "versions": {}},
        {"frontiers": {"a": 1.0}, "versions": {}},
        {"frontiers": {"a": True}, "versions": {}},
        {"frontiers": {1: 1}, "versions": {}},
        {"frontiers": {}, "versions": {"policy_value": None}},
    ],
)
def test_a_malformed_notice_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        Settled.from_message(replace(NOTICE.to_message("abc"), fields=fields))


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(WireError, match="not a notice"):
        Settled.from_message(replace(NOTICE.to_message("abc"), kind="snapshot"))
