from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.eval.metrics import exact_match, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_equals_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bounds_are_where_the_score_test_is_just_passed(counts: tuple[int, int]) -> None:
    """Wilson's interval holds the p for which |share - p| <= z sqrt(p (1 - p) / n): equality defines its bounds."""
    correct, n = counts
    share = correct / n
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= share <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:
        assert abs(share - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), rel=1e-6, abs=1e-9)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_right_and_wrong_mirror_each_other(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = wilson_interval(correct, n)
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low))


def test_nothing_is_known_without_items() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("response", "answer", "same"),
    [
        (" 42\n", "42", True),
        ("42.", "42", False),
        ("Yes", "yes", False),
        ("4 2", "42", False),
        ("", "0", False),
        ("caf\u00e9", "cafe\u0301", True),
    ],
)
def test_exact_match_forgives_outer_space_and_composition_alone(response: str, answer: str, same: bool) -> None:
    assert exact_match(response, answer) is same
