from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flowing import Flowing
from processes import System


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
