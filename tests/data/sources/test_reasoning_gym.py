from __future__ import annotations

import itertools

import pytest

from hrm_text.data.sources.reasoning_gym import TASKS, by_numbers, by_story, generate


def test_keys_ignore_what_does_not_make_a_problem_another_one() -> None:
    assert by_numbers("gcd of 12, 30?", "6") == by_numbers("gcd of 30 and 12?", "6")
    assert by_story("A is B's son.\n\nWho is A to B?", "son") == by_story("A is B's son.\n\nWho is B to A?", "mother")


def test_there_are_twenty_tasks_and_none_shares_words_with_gsm8k() -> None:
    assert len(TASKS) == 20
    assert not any("gsm" in name for name in TASKS)


def test_near_seeds_give_different_items_and_the_same_seed_the_same() -> None:
    pytest.importorskip("reasoning_gym")
    first, same, near = (list(itertools.islice(generate("gcd", seed), 100)) for seed in (0, 0, 1))
    assert first == same
    assert len({keyed.key for keyed in first} & {keyed.key for keyed in near}) < 10


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_questions_with_one_stored_answer(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    for keyed in itertools.islice(generate(task, 0), 10):
        assert keyed.key
        assert keyed.example.instruction
        assert keyed.example.response == keyed.answer
