from __future__ import annotations

import math

import pytest

from ami_shared.state import from_files, to_files
from ami_trainer.fresh_error import FIRST, FreshError


def test_before_anything_was_measured_there_is_no_error() -> None:
    assert FreshError().statistics() == {"first": None, "now": None}


def test_one_measurement_where_nothing_moved_does_not_rule_the_quotient() -> None:
    error = FreshError()
    for n in range(60):
        still = n % 3 == 2
        error.note(0.5, 0.002 if still else 1.0)  # a quotient of 250, as against 0.5
        told = error.statistics()
    assert told["first"] == pytest.approx(2.5 / 4.002)
    assert told["now"] == pytest.approx(0.75, rel=0.1)


def test_the_first_error_is_that_of_the_first_measurements_and_the_present_one_forgets_them() -> None:
    error = FreshError()
    for n in range(FIRST):
        error.note(float(n))
        assert error.statistics() == {"first": n / 2, "now": n / 2}
    for _ in range(100):
        error.note(10.0)
    assert error.statistics()["first"] == (FIRST - 1) / 2
    assert error.statistics()["now"] == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("absurd", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_does_not_count(absurd: tuple[float, float]) -> None:
    error = FreshError()
    error.note(*absurd)
    error.note(2.0)
    error.note(*absurd)
    assert error.statistics() == {"first": 2.0, "now": 2.0}


@pytest.mark.parametrize("measured", [0, 3, 30])
def test_after_a_restore_it_goes_on_alike(measured: int) -> None:
    error, again = FreshError(), FreshError()
    for n in range(measured):
        error.note(1.0 / (n + 1), 2.0)
    files = to_files("x", error.state())
    again.restore(from_files("x", {file.path: file.read(0, 1 << 20) for file in files}))
    for each in (error, again):
        each.note(7.0, 3.0)
    assert again.statistics() == error.statistics()


def test_errors_of_older_checkpoints_are_taken_over() -> None:
    error = FreshError()
    error.restore({"first": 0.5, "now": 0.25})
    assert error.statistics() == {"first": 0.5, "now": 0.25}
    error.note(0.35)
    assert error.statistics() == {"first": 0.5, "now": pytest.approx(0.575 / 1.9)}
    none = FreshError()
    none.restore({"first": None, "now": None})
    assert none.statistics() == {"first": None, "now": None}
