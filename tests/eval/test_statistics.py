from __future__ import annotations

import itertools
import math
import random

import pytest

from hrm_text.eval.metrics import wilson_interval
from hrm_text.eval.statistics import FEWEST_FOR_T, macro_interval, mean, mean_interval, paired, sign_test, t_quantile


def test_scores_of_0_and_1_have_wilsons_interval() -> None:
    interval = mean_interval([1.0] * 7 + [0.0] * 3)
    assert (interval.low, interval.high) == wilson_interval(7, 10)
    assert interval.method == "wilson"
    assert mean_interval([]).low == 0
    assert mean_interval([]).high == 1


@pytest.mark.parametrize(("freedom", "tabled"), [(9, 2.262), (15, 2.131), (30, 2.042), (120, 1.980), (10**6, 1.960)])
def test_quantiles_are_those_of_the_tables(freedom: int, tabled: float) -> None:
    assert t_quantile(freedom) == pytest.approx(tabled, abs=6e-4)


def test_intervals_of_fractions_hold_the_truth_as_often_as_they_say() -> None:
    """Drawn 1,000 times, with a true mean that is known, about 95 % of the intervals contain it."""
    rng = random.Random(0)
    worth, truth = (0.0, 0.25, 0.5, 1.0), 0.4375
    held = [mean_interval([rng.choice(worth) for _ in range(40)]) for _ in range(1000)]
    assert {each.method for each in held} == {"t"}
    assert 930 <= sum(each.low <= truth <= each.high for each in held) <= 970


@pytest.mark.parametrize(("n", "a", "b"), [(30, 0.02, 0.98), (30, 0.05, 0.95), (30, 0.95, 0.05), (200, 0.02, 0.98)])
def test_intervals_of_problems_that_are_mostly_failed_or_solved_hold_the_truth(n: int, a: float, b: float) -> None:
    """A problem's share of right samples is 0 or 1 but for a few: Student's t alone holds it in 69 to 89 %."""
    rng, truth = random.Random(2), a / (a + b)
    held = [mean_interval([round(256 * rng.betavariate(a, b)) / 256 for _ in range(n)]) for _ in range(400)]
    assert sum(each.low <= truth <= each.high for each in held) >= 380
    assert sum(each.high - each.low for each in held) / 400 < 0.2, "and they say something"


def test_few_or_equal_fractions_are_never_certain() -> None:
    for values in ([0.5] * 50, [0.5, 0.75], [0.25] * (FEWEST_FOR_T - 1)):
        interval = mean_interval(values)
        assert interval.method == "wilson"
        assert 0 < interval.low < mean(values) < interval.high < 1


def test_a_macro_mean_is_as_sure_as_its_least_known_subjects() -> None:
    even = macro_interval({"a": [1.0, 0.0] * 50, "b": [1.0, 0.0] * 50})
    uneven = macro_interval({"a": [1.0, 0.0] * 95, "b": [1.0, 0.0] * 5})
    assert even.high - even.low < uneven.high - uneven.low
    assert even.low < 0.5 < even.high
    one = macro_interval({"a": [1.0] * 10})
    assert one.high == 1
    assert one.low < 0.9


def test_the_sign_test_counts_every_way_the_coins_can_fall() -> None:
    """Compared with all 2^n outcomes, each equally likely."""
    for n in range(1, 11):
        heads = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        for seen in range(n + 1):
            as_uneven = sum(abs(each - n / 2) >= abs(seen - n / 2) for each in heads)
            assert sign_test(seen, n - seen) == pytest.approx(as_uneven / 2**n, abs=1e-15)
    assert sign_test(0, 0) == 1
    assert 0 < sign_test(2300, 2700) < 1e-7


def test_pairs_on_which_both_are_the_same_change_no_p() -> None:
    """McNemar: only the questions that tell the models apart count."""
    first, second = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    apart = paired(first, second)
    assert (apart.first_better, apart.second_better, apart.p) == (1, 6, 0.125)
    padded = paired([*first, *[1.0] * 50], [*second, *[1.0] * 50])
    assert padded.p == apart.p
    assert padded.difference == pytest.approx(5 / 57)
    assert padded.low < padded.difference < padded.high


def test_swapping_the_models_turns_the_comparison_round() -> None:
    rng = random.Random(1)
    first, second = ([rng.choice((0.0, 0.3, 1.0)) for _ in range(60)] for _ in range(2))
    there, back = paired(first, second), paired(second, first)
    assert (there.p, there.first_better, there.difference) == (back.p, back.second_better, -back.difference)
    assert there.low == pytest.approx(-back.high)


def test_equal_models_are_not_certainly_equal() -> None:
    same = paired([1.0, 0.0] * 20, [1.0, 0.0] * 20)
    assert same.p == 1
    assert same.difference == 0
    assert -0.1 < same.low < 0 < same.high < 0.1


def test_a_mean_does_not_depend_on_the_order() -> None:
    values = [random.Random(n).random() for n in range(200)]
    assert mean(values) == mean(sorted(values)) == math.fsum(values) / 200
