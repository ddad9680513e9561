from __future__ import annotations

import pytest

from hrm_text.eval.scoring.short_answers import score_short_answer
from hrm_text.eval.task import Question


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("Baltic Sea", 1),
        (" the  BALTIC sea.\n", 1),
        ("Baltic", 1),
        ("The Baltic Sea, I think", 0),
        ("Baltic\nQ: more", 0),
        ("North Sea", 0),
        ("the", 0),
        ("...", 0),
        ("", 0),
        ("Baltic " * 15_000, 0),
    ],
)
def test_case_articles_and_punctuation_are_forgiven_and_nothing_else(response: str, right: float) -> None:
    scored = score_short_answer(response, Question("0", "", ["the Baltic Sea", "Baltic", "the"]))
    assert (scored.strict, scored.published) == (right, right)
    assert scored.readable is (response.strip() not in ("the", "...", ""))
