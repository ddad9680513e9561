"""Answers that a response states: behind working, in whichever form, or alone."""

from __future__ import annotations

import re

from hrm_text.eval.scoring.boxed import last_boxed
from hrm_text.eval.task import Question, Scored


def answer_in(response: str, right: str) -> str:
    """The answer that a response gives: in a box, behind "the answer is", or its last line; of options the letter."""
    response = response.split("\nQ:")[0]  # what a model asks itself next is no answer
    stated = re.findall(r"answer(?: is:?|:)\s*(.+)", response, re.IGNORECASE)
    lines = [line for line in response.splitlines() if line.strip()] or [""]
    found = last_boxed(response) or (stated[-1] if stated else lines[-1])
    found = re.sub(r"^\\text\{(.*)\}$", r"\1", found.strip(" *$").rstrip(".*$ "))
    if re.fullmatch(r"\([A-Z]\)", right):
        letters = re.findall(r"\(([A-Z])\)|^([A-Z])(?=[.):]|$)", found)
        return f"({''.join(letters[0])})" if letters else ""
    return " ".join(found.lower().replace(",", " " if " " in right else "").split())


def score_stated(response: str, question: Question) -> Scored:
    """1 if the answers are the same, capitals, white space and a full stop aside."""
    got, right = answer_in(response, question.answer), answer_in(question.answer, question.answer)
    return Scored(float(got == right), float(got == right), got, readable=bool(got))
