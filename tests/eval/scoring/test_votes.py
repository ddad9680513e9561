from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.eval.scoring.votes import majority_score, pass_at_k
from hrm_text.eval.task import Scored


def samples(answers: str) -> list[Scored]:
    """One response for each character; ``7`` is right and ``-`` unreadable."""
    return [Scored(float(got == "7"), 0.0, got.strip("-"), readable=got != "-") for got in answers]


@pytest.mark.parametrize(
    ("answers", "worth"),
    [("7", 1), ("7712", 1), ("7112", 0), ("71", 1), ("17", 0), ("1771", 0), ("---7", 1), ("---", 0), ("", 0)],
)
def test_the_majority_decides_and_the_first_of_a_tie(answers: str, worth: float) -> None:
    assert majority_score(samples(answers)) == worth


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_all_ways_to_draw(case: tuple[int, int, int]) -> None:
    n, right, k = case
    draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_of_many() -> None:
    assert pass_at_k(256, 1, 100) == pytest.approx(100 / 256)
    assert pass_at_k(256, 157, 100) == 1
    assert pass_at_k(256, 0, 256) == 0
