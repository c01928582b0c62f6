"""How often somebody may do something."""

from __future__ import annotations

import pytest

from ami_controller import allowance
from ami_controller.allowance import Allowance


def test_so_many_at_once_and_then_so_many_a_second() -> None:
    allowed = Allowance(per_s=10.0, at_once=5.0)
    assert [allowed.take("a", 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert not allowed.take("a", 0.05)
    assert allowed.take("a", 0.15)
    assert not allowed.take("a", 0.16)
    assert sum(allowed.take("a", 1.0 + n * 0.001) for n in range(10_000)) in (104, 105)


def test_one_does_not_take_from_another() -> None:
    allowed = Allowance(per_s=1.0, at_once=1.0)
    assert allowed.take("a", 0.0)
    assert not allowed.take("a", 0.0)
    assert allowed.take("b", 0.0)


def test_it_does_not_grow_with_the_number_of_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "MOST_KNOWN", 10)
    allowed = Allowance(per_s=1.0, at_once=1.0)
    for stranger in range(1_000):
        assert allowed.take(stranger, 0.0)
    assert len(allowed._left) <= 10
