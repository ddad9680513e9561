"""Answers that are the letter of an option."""

from __future__ import annotations

import re
from functools import cache

from hrm_text.eval.scoring.boxed import last_boxed
from hrm_text.eval.task import Question, Scored


def letter(index: int) -> str:
    """The letter of an option, counted from 0."""
    assert 0 <= index < 26, index
    return chr(ord("A") + index)


def sole_letter(response: str, choices: int) -> str:
    """The letter that is all of the response, in either case; empty if it is anything else."""
    text = response.strip().upper()
    return text if len(text) == 1 and "A" <= text <= letter(choices - 1) else ""


def last_letter(response: str, choices: int) -> str:
    r"""The letter that a response with reasoning ends on; empty if it names none.

    Read is the last box, or the whole response where no box holds anything. A letter in round brackets counts before
    one that stands alone, and of several the last. Only capitals count: in prose a small "a" is an article.
    """
    text = last_boxed(response) or response
    bracketed, alone = _patterns(choices)
    found = bracketed.findall(text) or alone.findall(text)
    return found[-1] if found else ""


def score_sole_letter(response: str, question: Question) -> Scored:
    """Score a response that must be one letter and nothing else."""
    return _score(sole_letter(response, question.choices), question)


def score_last_letter(response: str, question: Question) -> Scored:
    """Score a response that reasons before it names a letter."""
    return _score(last_letter(response, question.choices), question)


def _score(got: str, question: Question) -> Scored:
    """The published protocol counts what cannot be read as a guess among the options."""
    right = float(got == question.answer)
    return Scored(right, right if got else 1 / question.choices, got, readable=bool(got))


@cache
def _patterns(choices: int) -> tuple[re.Pattern[str], re.Pattern[str]]:
    one_of = f"([A-{letter(choices - 1)}])"
    return re.compile(rf"\({one_of}\)"), re.compile(rf"\b{one_of}\b")
