from __future__ import annotations

import collections
import itertools
import random

import pytest

from hrm_text.contracts import UserError
from hrm_text.data.procedural import CPU_WEIGHTS, TASKS, answer_of, generate, held_out_items, is_held_out
from hrm_text.data.procedural.rendering import render

SMALL = [name for name in TASKS if not name.startswith("sudoku9")]


def test_the_same_seed_gives_the_same_examples_and_another_seed_others() -> None:
    first = list(generate(CPU_WEIGHTS, 3000, seed=4))
    assert first == list(generate(CPU_WEIGHTS, 3000, seed=4))
    assert first != list(generate(CPU_WEIGHTS, 3000, seed=5))
    assert first[:700] == list(itertools.islice(generate(CPU_WEIGHTS, 3000, seed=4), 700))


def test_conditions_and_tasks_come_in_their_shares() -> None:
    counts = collections.Counter(example.condition for example in generate({"add": 3, "upper": 1}, 10_000, seed=0))
    shares = {
        condition: 0.75 * TASKS["add"].conditions.get(condition, 0) + 0.25 * TASKS["upper"].conditions.get(condition, 0)
        for condition in {**TASKS["add"].conditions, **TASKS["upper"].conditions}
    }
    assert counts.keys() == shares.keys()
    assert all(abs(counts[condition] / 10_000 - share) < 0.02 for condition, share in shares.items())


@pytest.mark.parametrize("name", SMALL)
def test_no_held_out_problem_is_trained_on_in_any_wording_or_condition(name: str) -> None:
    """Every way of asking the held-out problems is absent from what training draws."""
    task = TASKS[name]
    plain = [condition for condition in task.conditions if "noisy" not in condition]
    trained = {(example.condition, example.instruction) for example in generate({name: 1}, 2000, seed=0)}
    rng, held_out = random.Random(7), 0
    for _ in range(300):
        problem = task.sample(rng)
        if is_held_out(name, problem.key):
            held_out += 1
            for condition, wording in itertools.product(plain, range(len(task.wordings))):
                assert (condition, render(task, problem, condition, wording, rng).instruction) not in trained
    assert 8 <= held_out <= 60


def test_commutative_twins_are_on_the_same_side() -> None:
    trained = {
        example.instruction
        for example in generate({"add": 1}, 30_000, seed=0)
        if example.condition == "cot" and " + " in example.instruction and example.instruction[0].isdigit()
    }
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if f"{a} + {b}" in trained]
    assert len(pairs) > 3000
    assert not any(is_held_out("add", f"{min(a, b)}+{max(a, b)}") for a, b in pairs)


@pytest.mark.parametrize("name", CPU_WEIGHTS)
def test_every_cpu_task_has_a_hundred_distinct_held_out_problems(name: str) -> None:
    condition = next(iter(TASKS[name].conditions))
    items = held_out_items(name, 100, seed=0, condition=condition)
    assert len({item.instruction for item in items}) == 100
    assert items == held_out_items(name, 100, seed=0, condition=condition)


def test_two_conditions_ask_the_same_held_out_problems() -> None:
    direct, cot = (held_out_items("sub", 50, seed=1, condition=condition) for condition in ("direct", "cot"))
    assert [item.instruction for item in direct] == [item.instruction for item in cot]
    assert [item.answer for item in direct] == [item.answer for item in cot]
    assert {item.condition for item in cot} == {"cot"}


def test_the_held_out_split_holds_the_held_out_problems_alone() -> None:
    asked = {item.instruction for item in held_out_items("parity", 2000, seed=0, condition="direct")}
    keys = {"".join(filter(str.isdigit, instruction)) for instruction in asked}
    drawn = {
        "".join(filter(str.isdigit, example.instruction)) for example in generate({"parity": 1}, 500, 0, "held_out")
    }
    assert all(is_held_out("parity", key) for key in keys | drawn)
    assert 900 <= len(keys) <= 1100  # a tenth of 10,000


def test_fewer_items_come_back_where_a_task_has_fewer() -> None:
    assert 100 <= len(held_out_items("clock", 10_000, seed=0, condition="direct")) <= 200


def test_an_unknown_task_or_condition_or_an_empty_choice_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="unknown task 'ad'"):
        generate({"ad": 1}, 1, 0)
    with pytest.raises(UserError, match="at least one task"):
        generate({"add": 0}, 1, 0)
    with pytest.raises(UserError, match="task 'upper' has no condition 'cot'; its tags are direct, noisy, synth"):
        held_out_items("upper", 1, 0, "cot")


def test_the_held_out_share_is_a_tenth() -> None:
    assert 900 < sum(is_held_out("add", str(i)) for i in range(10_000)) < 1100


def test_responses_of_the_mixture_carry_their_answer() -> None:
    for example in generate({"compare": 1}, 500, seed=0):
        assert answer_of(TASKS["compare"], example.response) in example.instruction
