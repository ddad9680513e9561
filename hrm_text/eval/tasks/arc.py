"""ARC-Challenge and ARC-Easy (Clark et al. 2018): multiple choice of school science.

Upstream names options by letters or by numerals; here an option has the letter of its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hrm_text.eval.few_shot import Choice, choice_questions
from hrm_text.eval.scoring.letters import score_sole_letter
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task

SHOTS = 25
FLAN = ("flan_flan2021_fs", "flan_flan2021_zs")


def choice(row: Row) -> Choice:
    return Choice(row["question"], row["choices"]["text"], list(row["choices"]["label"]).index(row["answerKey"]))


def arc(name: str, title: str) -> Task:
    """One of the two halves, after the first questions of its validation split."""
    validation, test = (Dataset("allenai/ai2_arc", config=title, split=split) for split in ("validation", "test"))

    def questions(rows: Rows) -> Iterator[Question]:
        return choice_questions(choice, rows(test), islice(rows(validation), SHOTS))

    data, score = (validation, test), score_sole_letter
    return Task(name, 1, title, data, questions, score, "direct", 1, shots=SHOTS, chance=0.25, held_in=FLAN)


TASKS = (arc("arc_challenge", "ARC-Challenge"), arc("arc_easy", "ARC-Easy"))
