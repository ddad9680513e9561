"""WinoGrande (Sakaguchi et al. 2019), trained on the debiased part: which of two names fills the gap of a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hrm_text.eval.few_shot import Choice, choice_questions
from hrm_text.eval.scoring.letters import score_sole_letter
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task

TRAIN, VALIDATION = (
    Dataset("allenai/winogrande", config="winogrande_debiased", split=split) for split in ("train", "validation")
)


def choice(row: Row) -> Choice:
    """The sentence with its gap, and what may fill it; upstream counts options from 1."""
    return Choice(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


def questions(rows: Rows) -> Iterator[Question]:
    """After the first sentences of the training split."""
    return choice_questions(choice, rows(VALIDATION), islice(rows(TRAIN), TASK.shots))


TASK = Task(
    name="winogrande",
    version=1,
    title="WinoGrande",
    datasets=(TRAIN, VALIDATION),
    questions=questions,
    score=score_sole_letter,
    condition="direct",
    max_new_tokens=1,
    shots=5,
    chance=0.5,
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
