"""ARC-Challenge and ARC-Easy (Clark et al. 2018): multiple choice of school science.

Upstream names options by letters or by numerals; here an option has the letter of its place.
"""

from __future__ import annotations

from hrm_text.eval.few_shot import Choice, choice_task
from hrm_text.eval.task import Dataset, Row


def choice(row: Row) -> Choice:
    """The question; its key is one of the labels."""
    return Choice(row["question"], row["choices"]["text"], list(row["choices"]["label"]).index(row["answerKey"]))


TASKS = tuple(
    choice_task(
        name,
        title,
        examples=Dataset("allenai/ai2_arc", config=title, split="validation"),
        asked=Dataset("allenai/ai2_arc", config=title, split="test"),
        choice=choice,
        shots=25,
        chance=0.25,
        held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
    )
    for name, title in (("arc_challenge", "ARC-Challenge"), ("arc_easy", "ARC-Easy"))
)
