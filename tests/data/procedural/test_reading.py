from __future__ import annotations

import random

from hrm_text.data.procedural import TASKS
from hrm_text.data.procedural.vocabulary import CATEGORIES


def test_the_answer_of_a_reading_question_is_told_in_the_passage_once_for_that_person() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = TASKS["reading"].sample(rng)
        assert problem.answer in problem.fields["passage"]


def test_only_one_person_fits_a_who_question() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = TASKS["who"].sample(rng)
        facts, question = problem.key.split("? ")
        assert [fact.split(" ", 1)[0] for fact in facts.split("; ") if fact.split(" ", 1)[1] == question] == [
            problem.answer
        ]


def test_yes_means_that_the_claim_is_among_the_facts() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = TASKS["yes_no"].sample(rng)
        facts, claim = problem.key.split("? ")
        assert (claim in facts.split("; ")) == (problem.answer == "yes")


def test_no_word_belongs_to_two_kinds() -> None:
    members = [word for words in CATEGORIES.values() for word in words]
    assert len(set(members)) == len(members) == 12 * len(CATEGORIES)


def test_the_letter_names_the_member_of_the_kind() -> None:
    rng = random.Random(0)
    for _ in range(200):
        problem = TASKS["choice"].sample(rng)
        options = dict(line.split(". ") for line in problem.fields["options"].splitlines())
        members = CATEGORIES[problem.fields["kind"]]
        assert [letter for letter, word in options.items() if word in members] == [problem.answer]
