from __future__ import annotations

import pytest

from hrm_text.eval.scoring.letters import last_letter, letter, score_last_letter, score_sole_letter, sole_letter
from hrm_text.eval.task import Question

ENDLESS = 100_000


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("b", "B"),
        ("D", "D"),
        ("E", ""),
        ("B.", ""),
        ("(B)", ""),
        ("B. iron", ""),
        ("AB", ""),
        ("The", ""),
        ("2", ""),
        ("\u0392", ""),
        ("\u00df", ""),
        ("", ""),
        ("B" * ENDLESS, ""),
    ],
)
def test_a_letter_that_is_all(response: str, found: str) -> None:
    assert sole_letter(response, 4) == found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("B", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B.", "B"),
        ("(A) is wrong, and so is (C). It must be (B)", "B"),
        ("(B) it is, not A", "B"),
        (r"Not (A). \boxed{B}", "B"),
        (r"Not (A). \boxed{\text{(B)}}", "B"),
        (r"\boxed{A} no, \boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"It is (B). \boxed{}", "B"),
        (r"It is (B). \boxed{7}", ""),
        ("a or b", ""),
        ("(b)", ""),
        ("(E)", ""),
        ("Answer", ""),
        ("ABBA", ""),
        ("B_1", ""),
        ("", ""),
        ("word " * (ENDLESS // 5) + "(B)", "B"),
        ("(" * ENDLESS, ""),
        ("A" * ENDLESS, ""),
    ],
)
def test_the_letter_that_reasoning_ends_on(response: str, found: str) -> None:
    assert last_letter(response, 4) == found


def test_every_option_has_its_letter() -> None:
    letters = [letter(index) for index in range(10)]
    assert letters == list("ABCDEFGHIJ")
    assert [sole_letter(each, 10) for each in letters] == [last_letter(f"({each})", 10) for each in letters] == letters


@pytest.mark.parametrize("choices", [2, 4, 10])
def test_what_cannot_be_read_counts_as_a_guess_as_published_and_nothing_strictly(choices: int) -> None:
    question = Question("0", "", "B", choices=choices)
    for score in (score_sole_letter, score_last_letter):
        unreadable = score("no idea", question)
        assert (unreadable.strict, unreadable.published, unreadable.readable) == (0, 1 / choices, False)
        for response, worth in (("A", 0), ("B", 1)):
            read = score(response, question)
            assert (read.strict, read.published, read.got, read.readable) == (worth, worth, response, True)
