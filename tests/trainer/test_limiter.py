from __future__ import annotations

from typing import Any

import pytest

from ami_shared.errors import ConfigurationError
from ami_trainer.limiter import UpdateLimiter


def test_each_record_pays_for_its_updates() -> None:
    limiter = UpdateLimiter(0.5)
    limiter.record(3)
    assert limiter.available() == 1
    limiter.spend()
    assert limiter.available() == 0
    limiter.record(1)
    assert limiter.available() == 1


def test_what_a_slow_trainer_cannot_use_is_forfeited_and_counted() -> None:
    limiter = UpdateLimiter(2.0, most_saved=10)
    limiter.record(8)
    assert (limiter.available(), limiter.forfeited) == (10, 6)


def test_in_lockstep_nothing_is_forfeited() -> None:
    limiter = UpdateLimiter(2.0, most_saved=10)
    limiter.save_all()
    limiter.record(800)
    assert (limiter.available(), limiter.forfeited) == (1_600, 0)


@pytest.mark.parametrize("updates", [0, -1, float("nan"), float("inf"), "2", None, True])
def test_a_rate_that_is_none_is_refused(updates: Any) -> None:
    with pytest.raises(ConfigurationError, match="updates_per_record"):
        UpdateLimiter(updates)
