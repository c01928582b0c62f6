"""What may be called how."""

from __future__ import annotations

import pytest

from ami_shared.names import is_name


@pytest.mark.parametrize(
    "name", ["body", "null", "com", "com10", "console", "image_encoder-2.1", "2026-11-24_12-00-00", "_a", "x" * 64]
)
def test_a_name(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a/b",
        "a\\b",
        "..",
        ".hidden",
        "-b",
        "kör",
        "体",
        "a b",
        "x" * 65,
        "a\0b",
        "a\n",
        "v1.",
        "nul",
        "AUX",
        "com1",
        "Con.json",
    ],
)
def test_what_could_not_be_a_file_on_every_system_is_no_name(name: str) -> None:
    assert not is_name(name)
