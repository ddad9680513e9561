from __future__ import annotations

import pytest

from hrm_text.contracts import UserError
from hrm_text.settings import from_mapping
from hrm_text.train.schedule import CreditAssignment, LearningRate


def test_warmup_then_constant() -> None:
    rate = LearningRate(peak=8.0, warmup_steps=4)
    assert [rate.at(step, 8) for step in range(8)] == [2, 4, 6, 8, 8, 8, 8, 8]


def test_cosine_starts_at_the_peak_and_ends_at_the_floor() -> None:
    rate = LearningRate(peak=1.0, warmup_steps=0, decay="cosine", floor=0.0)
    assert [rate.at(step, 5) for step in range(5)] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    rate = LearningRate(peak=10.0, warmup_steps=2, decay="cosine", floor=0.1)
    assert [rate.at(step, 5) for step in range(5)] == pytest.approx([5, 10, 10, 5.5, 1])


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_a_run_may_be_as_short_as_its_warmup_or_shorter(decay: str) -> None:
    for total, expected in ((1, [0.25]), (4, [0.25, 0.5, 0.75, 1]), (5, [0.25, 0.5, 0.75, 1, 1])):
        rate = from_mapping(LearningRate, {"peak": 1.0, "warmup_steps": 4, "decay": decay}, "test")
        assert [rate.at(step, total) for step in range(total)] == expected


def test_k_of_the_released_recipe() -> None:
    # 60 warm-up steps of 300, K from 2 to 5 in thirds of it
    table = {0: 2, 19: 2, 20: 3, 39: 3, 40: 4, 59: 4, 60: 5, 61: 5, 299: 5}
    assert {step: CreditAssignment().at(step, 300, 5) for step in table} == table


def test_k_of_short_runs() -> None:
    assert [CreditAssignment().at(step, 10, 5) for step in range(4)] == [2, 3, 5, 5]
    assert [CreditAssignment().at(step, 1, 5) for step in range(1)] == [2]
    assert [CreditAssignment(warmup_ratio=1.0).at(step, 6, 5) for step in range(6)] == [2, 2, 3, 3, 4, 4]


def test_without_warmup_k_is_greatest_from_the_first_step() -> None:
    assert CreditAssignment(warmup_ratio=0.0).at(0, 100, 5) == 5


def test_a_model_with_fewer_calls_than_k_min_uses_all() -> None:
    assert [CreditAssignment().at(step, 10, 1) for step in (0, 9)] == [1, 1]


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (LearningRate, {"peak": 0}, "peak: .*greater than 0.*found 0"),
        (LearningRate, {"peak": 1, "warmup_steps": -1}, "warmup_steps: .*found -1"),
        (LearningRate, {"peak": 1, "decay": "linear"}, "decay: .*'constant' or 'cosine'.*found 'linear'"),
        (LearningRate, {"peak": 1, "floor": 2}, "floor: .*found 2"),
        (LearningRate, {"peak": 1, "warmup": 2}, "unknown key 'warmup'; did you mean 'warmup_steps'"),
        (LearningRate, {"peak": float("nan")}, "peak: "),
        (CreditAssignment, {"k_min": 0}, "k_min: .*found 0"),
        (CreditAssignment, {"warmup_ratio": 1.5}, "warmup_ratio: .*found 1.5"),
    ],
)
def test_settings_out_of_range_name_their_key(cls: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_mapping(cls, values, "run.yaml")


def test_steps_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="found step -1 of 10"):
        LearningRate(peak=1.0).at(-1, 10)
    with pytest.raises(ValueError, match="found step 0 of 0"):
        CreditAssignment().at(0, 0, 5)
    with pytest.raises(ValueError, match="k_max >= 1, found 0"):
        CreditAssignment().at(0, 10, 0)
