from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from ami_shared.uris import sqlite_uri, without_passwords


@pytest.mark.parametrize("text", ["sqlite:////a/b.db", "http://127.0.0.1:5000", "http://me@host/x", "databricks", "0"])
def test_what_has_no_password_is_shown_as_it_is(text: str) -> None:
    assert without_passwords(text) == text


def test_passwords_are_shown_to_nobody() -> None:
    text = "camera: rtsp://me:se@cr:et@host/x\ntracker: http://:pw@h:5000"
    assert without_passwords(text) == "camera: rtsp://me:***@host/x\ntracker: http://:***@h:5000"


@pytest.mark.parametrize("name", ["plain", "a?b", "50%20x", "C#", "日本 語", "a&b=c"])
def test_a_database_lies_where_its_path_says(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "mlflow.db"
    assert make_url(sqlite_uri(path)).database == str(path)
