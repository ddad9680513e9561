"""Natural Questions, open (Lee et al. 2019): short facts that people searched for, answered without a text.

Of the closed-book sets it is the one most often reported with five examples, and small: 3,610 questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hrm_text.eval.few_shot import FewShot, Shot
from hrm_text.eval.scoring.short_answers import score_short_answer
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task

TRAIN, VALIDATION = (Dataset("google-research-datasets/nq_open", split=split) for split in ("train", "validation"))


def asked(row: Row) -> str:
    return f"Q: {row['question'].strip()}?\nA:"


def questions(rows: Rows) -> Iterator[Question]:
    """After the first questions of the training split."""
    few = FewShot(Shot(asked(row), row["answer"][0]) for row in islice(rows(TRAIN), TASK.shots))
    for index, row in enumerate(rows(VALIDATION)):
        yield few.ask(asked(row), id=str(index), answer=list(row["answer"]))


TASK = Task(
    name="nq_open",
    version=1,
    title="Natural Questions",
    datasets=(TRAIN, VALIDATION),
    questions=questions,
    score=score_short_answer,
    condition="direct",
    max_new_tokens=32,
    shots=5,
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
