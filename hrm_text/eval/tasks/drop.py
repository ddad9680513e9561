"""DROP (Dua et al. 2019): questions about a passage that need counting, sorting or arithmetic; F1 of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice

from hrm_text.eval.few_shot import FewShot, Shot
from hrm_text.eval.scoring.drop import accepted_answers, score_drop
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task

TRAIN, VALIDATION = (Dataset("EleutherAI/drop", split=split) for split in ("train", "validation"))


def asked(row: Row) -> str:
    """The passage, the question, and where the answer goes."""
    return f"{row['passage'].strip()}\nQ: {row['question'].strip()}\nA:"


def questions(rows: Rows) -> Iterator[Question]:
    """After the first question of each of the first passages: questions about one passage follow one another."""
    first_rows = islice((next(group) for _, group in groupby(rows(TRAIN), lambda row: row["passage"])), TASK.shots)
    few = FewShot(Shot(asked(row), ", ".join(accepted_answers(row)[0])) for row in first_rows)
    for row in rows(VALIDATION):
        yield few.ask(asked(row), id=row["query_id"], answer=accepted_answers(row))


TASK = Task(
    name="drop",
    version=1,
    title="DROP",
    datasets=(TRAIN, VALIDATION),
    questions=questions,
    score=score_drop,
    condition="direct",
    max_new_tokens=3072,
    context=3072,
    shots=3,
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
