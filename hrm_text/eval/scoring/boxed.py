r"""Answers in ``\boxed{...}``, and integers among them."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from hrm_text.eval.task import Question, Scored

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""A brace, or a backslash with what it escapes: ``\\{`` is a character of the answer."""

_OPENING = re.compile(r"\s*\{")
_THOUSANDS = str.maketrans("", "", ",$")


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, braces balanced, without outer white space; None if there is none.

    The innermost of nested boxes starts last, so it counts. A last box that is never closed is an answer cut off: an
    earlier one, which the model went on from, does not stand in for it. ``\fbox`` counts where no ``\boxed`` is.
    Time is linear in the length of the text.
    """
    for mark in (r"\boxed", r"\fbox"):
        start = text.rfind(mark)
        if start < 0:
            continue
        opening = _OPENING.match(text, start + len(mark))
        if opening is None:
            return None
        depth = 1
        for brace in _BRACE.finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[opening.end() : brace.start()].strip()
        return None
    return None


def score_integer(response: str, question: Question) -> Scored:
    """Compare the number in the last box, or the whole response where no box holds anything, with an integer.

    Commas and dollar signs are left out; any other unit makes the answer unreadable. The published protocol cuts the
    fraction off before it compares, so that 18.9 passes for 18; strictly the two numbers must be equal.

    Args:
        response: of the model.
        question: its answer is an int.
    """
    text = (last_boxed(response) or response).translate(_THOUSANDS).strip()
    try:
        published = int(float(text))
        exact = Decimal(text)
    except (ValueError, OverflowError, InvalidOperation):
        return Scored(0.0, 0.0, "", readable=False)
    got = str(published) if exact == published else text
    return Scored(float(exact == question.answer), float(published == question.answer), got, readable=True)
