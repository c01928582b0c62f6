from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flowing import Flowing
from processes import System

from capabilities import sharing_memory


@pytest.fixture
def make_system(tmp_path: Path) -> Iterator[Callable[..., System]]:
    """Makes systems whose processes are ended after the test."""
    made: list[System] = []

    def make(*overrides: str, **options: Any) -> System:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(System(folder, *overrides, **options))
        return made[-1]

    yield make
    for system in made:
        system.close()


@pytest.fixture
def make_flowing(make_system: Callable[..., System]) -> Iterator[Callable[..., Flowing]]:
    """Makes systems whose records flow, with an auditor, who leaves after the test."""
    made: list[Flowing] = []

    def make(*overrides: str) -> Flowing:
        made.append(Flowing(make_system(*overrides)))
        return made[-1]

    yield make
    for flowing in made:
        flowing.close()


@pytest.fixture(params=[pytest.param(True, marks=sharing_memory, id="memory"), pytest.param(False, id="wire")])
def in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether processes that are started from now on see each other's memory."""
    if not request.param:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "without_shared_memory"), prepend=os.pathsep)
    return bool(request.param)
