from __future__ import annotations

import collections
import random

import pytest

from hrm_text.contracts import CONDITIONS, UserError
from hrm_text.data.procedural import CPU_WEIGHTS, TASKS, find_task
from hrm_text.data.procedural.registry import Problem, task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_description_and_at_least_three_distinct_wordings(name: str) -> None:
    assert TASKS[name].description
    assert len(set(TASKS[name].wordings)) == len(TASKS[name].wordings) >= 3


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("sudoku9")])
def test_chance_is_no_lower_than_always_giving_the_most_common_answer(name: str) -> None:
    rng = random.Random(0)
    answers = collections.Counter(TASKS[name].sample(rng).answer for _ in range(2000))
    assert answers.most_common(1)[0][1] / 2000 <= TASKS[name].chance + 0.03


def test_all_four_tags_and_compositions_occur_over_the_tasks_of_the_cpu_mixture() -> None:
    tags = {tag for name in CPU_WEIGHTS for tag in TASKS[name].tags}
    assert tags == set(CONDITIONS)
    assert len(CPU_WEIGHTS) >= 10


def test_an_unknown_task_is_an_error_that_suggests_and_lists() -> None:
    with pytest.raises(UserError, match=r"unknown task 'revrese': did you mean 'reverse'\?.*sudoku4"):
        find_task("revrese")


def test_a_name_cannot_be_registered_twice() -> None:
    with pytest.raises(AssertionError, match="registered twice"):

        @task("add", chance=0, wordings=("{a}",), conditions={"direct": 1}, sentence="It is {answer}.")
        def again(rng: random.Random) -> Problem:
            """Not a second addition."""
            return Problem("", {}, "")


def test_the_tag_cot_needs_steps() -> None:
    with pytest.raises(AssertionError, match="needs steps"):

        @task("stepless", chance=0, wordings=("{a}",), conditions={"cot": 1}, sentence="It is {answer}.")
        def stepless(rng: random.Random) -> Problem:
            """No working to show."""
            return Problem("", {}, "")

    assert "stepless" not in TASKS
