from __future__ import annotations

import random
import re

import pytest

from hrm_text.data.procedural import TASKS, answer_of
from hrm_text.data.procedural.registry import Problem
from hrm_text.data.procedural.rendering import misspell, render


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_read_back_from_every_condition_and_wording(name: str) -> None:
    task, rng = TASKS[name], random.Random(1)
    for _ in range(40 if not name.startswith("sudoku9") else 2):
        problem = task.sample(rng)
        for condition in task.conditions:
            for wording in range(len(task.wordings)):
                example = render(task, problem, condition, wording, rng)
                assert example.condition == condition
                assert answer_of(task, example.response) == problem.answer


@pytest.mark.parametrize("name", TASKS)
def test_an_instruction_shows_the_whole_problem_in_every_wording(name: str) -> None:
    task, rng = TASKS[name], random.Random(2)
    shown = [set(re.findall(r"\{(\w+)\}", wording)) for wording in task.wordings]
    assert all(fields == shown[0] for fields in shown)
    problem = task.sample(rng)
    for condition in task.conditions:
        example = render(task, problem, condition, 0, rng)
        assert all(str(problem.fields[name]) in example.instruction for name in shown[0])


def test_tags_compose() -> None:
    add, problem, rng = TASKS["add"], Problem("38+47", {"a": 47, "b": 38}, "85"), random.Random(0)
    responses = {
        condition: render(add, problem, condition, 1, rng).response for condition in ("direct", "cot", "synth,cot")
    }
    assert responses["direct"] == "85"
    assert responses["cot"] == "7+8=15 c1, 4+3+1=8, = 85"
    assert responses["synth,cot"] == "7+8=15 c1, 4+3+1=8, The sum is 85."
    assert render(add, problem, "direct", 1, rng).instruction == "What is 47 + 38?"
    assert render(add, problem, "noisy,cot", 1, rng).response == responses["cot"]


def test_noise_changes_the_wording_and_leaves_the_fields() -> None:
    rng = random.Random(3)
    template = "Which is larger, {a} or {b}?"
    noisy = [misspell(template, rng) for _ in range(300)]
    assert all(text != template for text in noisy)
    assert all(re.fullmatch(r"\S.* \{a\} +or +\{b\} *\?", text) for text in noisy)
    assert len(set(noisy)) > 50
    assert misspell("{a} + {b}", rng) == "{a}  +  {b}"


def test_an_answer_without_any_marker_is_the_response_itself() -> None:
    assert answer_of(TASKS["add"], " 85\n") == "85"
    assert answer_of(TASKS["add"], "7+8=15 c1, 4+3+1=8, = 86 = 85") == "85"
    assert answer_of(TASKS["add"], "") == ""
