from __future__ import annotations

import random
import re

import pytest

from hrm_text.data.procedural import TASKS
from hrm_text.data.procedural.arithmetic import addition_steps, subtraction_steps

WITH_SUMS = ["add", "sub", "long_add", "long_sub", "multiply", "sum_list", "word_problem", "later", "weekday", "divide"]


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [
        (47, 38, "7+8=15 c1, 4+3+1=8,"),
        (12, 7, "2+7=9 c0, 1+0+0=1,"),
        (99, 99, "9+9=18 c1, 9+9+1=19,"),
        (3, 4, "3+4=7,"),
    ],
)
def test_addition_is_written_by_columns_from_the_units(a: int, b: int, steps: str) -> None:
    assert addition_steps(a, b) == steps


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [(45, 17, "15-7=8 b1, 4-1-1=2,"), (45, 42, "5-2=3 b0, 4-4-0=0,"), (100, 1, "10-1=9 b1, 10-0-1=9 b1, 1-0-1=0,")],
)
def test_subtraction_is_written_by_columns_from_the_units(a: int, b: int, steps: str) -> None:
    assert subtraction_steps(a, b) == steps


@pytest.mark.parametrize("name", WITH_SUMS)
def test_every_equation_in_the_working_is_true(name: str) -> None:
    task, rng = TASKS[name], random.Random(0)
    assert task.steps is not None
    for _ in range(300):
        for equation in re.findall(r"[\d+*/-]+=\d+", task.steps(**task.sample(rng).fields)):
            left, right = equation.split("=")
            assert int(eval(left.replace("/", "//"))) == int(right), equation


@pytest.mark.parametrize("name", ["add", "long_add", "sub", "long_sub", "multiply"])
def test_answers_equal_the_operation(name: str) -> None:
    rng = random.Random(5)
    operation = {"add": int.__add__, "sub": int.__sub__, "multiply": int.__mul__}[name.removeprefix("long_")]
    for _ in range(300):
        problem = TASKS[name].sample(rng)
        assert problem.answer == str(operation(problem.fields["a"], problem.fields["b"]))
