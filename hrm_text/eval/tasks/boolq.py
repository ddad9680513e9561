"""BoolQ (Clark et al. 2019): questions about a passage that are answered by yes or no, given as options A and B."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hrm_text.eval.few_shot import Choice, choice_questions
from hrm_text.eval.scoring.letters import score_sole_letter
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task

TRAIN, VALIDATION = (Dataset("google/boolq", split=split) for split in ("train", "validation"))


def choice(row: Row) -> Choice:
    """The passage, then the question, which upstream writes small and without its mark."""
    return Choice(
        f"{row['passage']}\nQuestion: {row['question'].capitalize()}?", ["Yes", "No"], 1 - bool(row["answer"])
    )


def questions(rows: Rows) -> Iterator[Question]:
    """After the first questions of the training split."""
    return choice_questions(choice, rows(VALIDATION), islice(rows(TRAIN), TASK.shots))


TASK = Task(
    name="boolq",
    version=1,
    title="BoolQ",
    datasets=(TRAIN, VALIDATION),
    questions=questions,
    score=score_sole_letter,
    condition="direct",
    max_new_tokens=1,
    shots=5,
    chance=0.6217,  # of always saying yes
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
