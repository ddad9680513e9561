"""Short answers in words, compared as texts."""

from __future__ import annotations

import re
import string

from hrm_text.eval.task import Question, Scored

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def score_short_answer(response: str, question: Question) -> Scored:
    """Whether all of the response is one of the accepted answers, but for case, punctuation, articles and space.

    Args:
        response: of the model.
        question: its answer is a list of accepted answers.
    """
    got = plain(response)
    right = float(bool(got) and got in map(plain, question.answer))
    return Scored(right, right, response.strip(), readable=bool(got))


def plain(text: str) -> str:
    """Lower case without punctuation and articles, one space between words: as is usual since SQuAD."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())
