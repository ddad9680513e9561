from __future__ import annotations

from collections.abc import Sequence

import pytest

from hrm_text.data.procedural import CPU_WEIGHTS, TASKS, generate, held_out_items
from hrm_text.eval.runner import evaluate
from hrm_text.eval.tasks.procedural import longest_response, procedural_task


class Says:
    """An engine that answers each prompt from a table."""

    def __init__(self, responses: dict[str, str]) -> None:
        self.responses = responses

    def generate(self, prompts: Sequence[str], **settings: object) -> list[str]:
        return [self.responses[prompt] for prompt in prompts]


@pytest.mark.parametrize("name", CPU_WEIGHTS)
def test_the_items_are_the_held_out_problems_under_the_usual_condition(name: str) -> None:
    task = procedural_task(name, n=20, seed=3)
    usual = max(TASKS[name].conditions.items(), key=lambda share: share[1])[0]
    expected = held_out_items(name, 20, 3, usual)
    assert [(i.prompt, i.condition, i.answer) for i in task.items] == [tuple(item)[:3] for item in expected]
    assert task.chance == TASKS[name].chance


@pytest.mark.parametrize("name", CPU_WEIGHTS)
def test_responses_of_the_generator_itself_are_right_under_every_condition(name: str) -> None:
    """The examples' own responses, held out, score 1, and fit into the length that the task allows."""
    for condition in TASKS[name].conditions:
        task = procedural_task(name, condition=condition, n=20)
        assert max(len(item.answer.encode()) for item in task.items) < task.max_new_tokens
        extract_answer = task.items[0].extract_answer
        own = [e for e in generate({name: 1}, 300, seed=1, split="held_out") if e.condition == condition]
        assert own
        for example in own:
            answer = extract_answer(example.response)
            assert example.response.removesuffix(".").endswith(answer)
            assert answer
            assert "=" not in answer
            if {"cot", "synth"} & set(condition.split(",")):
                assert len(example.response.encode()) < task.max_new_tokens


def test_working_with_a_wrong_end_is_wrong_and_the_bare_answer_right() -> None:
    task = procedural_task("add", condition="cot", n=4)
    assert task.name == "add:cot"
    a, b, c, d = task.items
    responses = {
        a.prompt: f"1+1=2, = {a.answer}",
        b.prompt: f"The sum is {b.answer}.",
        c.prompt: c.answer,
        d.prompt: f"1+1=2, = {d.answer}0",
    }
    assert [result.ok for result in evaluate(Says(responses), [task]).results] == [True, True, True, False]


def test_two_conditions_ask_the_same_problems() -> None:
    direct, cot = (procedural_task("sub", condition=condition, n=30) for condition in ("direct", "cot"))
    assert [item.prompt for item in direct.items] == [item.prompt for item in cot.items]
    assert [item.answer for item in direct.items] == [item.answer for item in cot.items]


def test_a_bare_answer_is_allowed_less_than_working() -> None:
    direct = procedural_task("add", condition="direct")
    assert direct.max_new_tokens == max(len(item.answer) for item in direct.items) + 1 == 4
    assert procedural_task("add", condition="cot").max_new_tokens == longest_response(TASKS["add"], "cot") + 1 > 20
