"""HellaSwag (Zellers et al. 2019): which of four endings continues a description of everyday life."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hrm_text.eval.few_shot import Choice, choice_questions
from hrm_text.eval.scoring.letters import score_sole_letter
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task

TRAIN, VALIDATION = (Dataset("Rowan/hellaswag", split=split) for split in ("train", "validation"))


def choice(row: Row) -> Choice:
    """The context with what the endings have in common, then the question."""
    text = f"{row['ctx_a']} {row['ctx_b'].capitalize()}\nQuestion: Which ending follows best?"
    return Choice(text, row["endings"], int(row["label"]))


def questions(rows: Rows) -> Iterator[Question]:
    """After the first contexts of the training split."""
    return choice_questions(choice, rows(VALIDATION), islice(rows(TRAIN), TASK.shots))


TASK = Task(
    name="hellaswag",
    version=1,
    title="HellaSwag",
    datasets=(TRAIN, VALIDATION),
    questions=questions,
    score=score_sole_letter,
    condition="direct",
    max_new_tokens=1,
    shots=10,
    chance=0.25,
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
