from __future__ import annotations

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


@pytest.mark.parametrize("updates", [0, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(updates: float) -> None:
    with pytest.raises(ConfigurationError, match="updates_per_record"):
        UpdateLimiter(updates)
