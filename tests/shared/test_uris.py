from __future__ import annotations

import pytest

from ami_shared.uris import without_passwords


@pytest.mark.parametrize("text", ["sqlite:////a/b.db", "http://127.0.0.1:5000", "http://me@host/x", "databricks", "0"])
def test_what_has_no_password_is_shown_as_it_is(text: str) -> None:
    assert without_passwords(text) == text


def test_passwords_are_shown_to_nobody() -> None:
    text = "camera: rtsp://me:se@cr:et@host/x\ntracker: http://:pw@h:5000"
    assert without_passwords(text) == "camera: rtsp://me:***@host/x\ntracker: http://:***@h:5000"
