"""AIME 2025: 30 competition problems with integers below 1,000 as answers; majority and pass@k of many responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from hrm_text.eval.scoring.boxed import score_integer
from hrm_text.eval.task import Dataset, Question, Rows, Scored, Task

TEST = Dataset("math-ai/aime25")


def questions(rows: Rows) -> Iterator[Question]:
    """The problem alone."""
    for index, row in enumerate(rows(TEST)):
        yield Question(str(index), row["problem"].strip(), int(row["answer"]))


def score(response: str, question: Question) -> Scored:
    """An integer from 0 to 999; any other number has no vote, and nothing is cut off."""
    scored = score_integer(response, question)
    if not (scored.got.isdecimal() and len(scored.got) <= 3):
        return Scored(0.0, 0.0, "", readable=False)
    return dataclasses.replace(scored, published=scored.strict)


TASK = Task(
    name="aime",
    version=1,
    title="AIME 2025",
    datasets=(TEST,),
    questions=questions,
    score=score,
    condition="synth,cot",
    max_new_tokens=4096,
    samples=256,
    temperature=0.6,
)
