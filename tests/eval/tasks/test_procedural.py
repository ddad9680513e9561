from __future__ import annotations

import pytest

from hrm_text.data.procedural import CPU_WEIGHTS, TASKS, generate, held_out_items
from hrm_text.eval.exact import given_questions
from hrm_text.eval.tasks.procedural import longest_response, procedural_task


@pytest.mark.parametrize("name", CPU_WEIGHTS)
def test_the_items_are_the_held_out_problems_under_the_usual_condition(name: str) -> None:
    task = procedural_task(name, n=20, seed=3)
    usual = max(TASKS[name].conditions.items(), key=lambda share: share[1])[0]
    expected = held_out_items(name, 20, 3, usual)
    found = [(each.prompt, task.asked_under(each), each.answer) for each in given_questions(task)]
    assert found == [tuple(item)[:3] for item in expected]
    assert task.chance == TASKS[name].chance


@pytest.mark.parametrize("name", CPU_WEIGHTS)
def test_responses_of_the_generator_itself_are_right_under_every_condition(name: str) -> None:
    """The examples' own responses, held out, score 1, and fit into the length that the task allows."""
    for condition in TASKS[name].conditions:
        task = procedural_task(name, condition=condition, n=20)
        questions = given_questions(task)
        assert max(len(each.answer.encode()) for each in questions) < task.max_new_tokens
        own = [e for e in generate({name: 1}, 300, seed=1, split="held_out") if e.condition == condition]
        assert own
        for example in own:
            answer = task.score(example.response, questions[0]).got
            assert example.response.removesuffix(".").endswith(answer)
            assert answer
            assert "=" not in answer
            if {"cot", "synth"} & set(condition.split(",")):
                assert len(example.response.encode()) < task.max_new_tokens


def test_working_with_a_wrong_end_is_wrong_and_the_bare_answer_right() -> None:
    task = procedural_task("add", condition="cot", n=4)
    assert task.name == "add:cot"
    questions = given_questions(task)
    a, b, c, d = (each.answer for each in questions)
    responses = [f"1+1=2, = {a}", f"The sum is {b}.", c, f"1+1=2, = {d}0"]
    assert [task.score(*each).strict for each in zip(responses, questions, strict=True)] == [1, 1, 1, 0]


def test_two_conditions_ask_the_same_problems() -> None:
    direct, cot = (procedural_task("sub", condition=condition, n=30) for condition in ("direct", "cot"))
    assert given_questions(direct) == given_questions(cot)


def test_a_bare_answer_is_allowed_less_than_working() -> None:
    direct = procedural_task("add", condition="direct")
    assert direct.max_new_tokens == max(len(each.answer) for each in given_questions(direct)) + 1 == 4
    assert procedural_task("add", condition="cot").max_new_tokens == longest_response(TASKS["add"], "cot") + 1 > 20
