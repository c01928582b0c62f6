from __future__ import annotations

from collections.abc import Iterator

import pytest
from listening import Listener


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()
