"""BoolQ (Clark et al. 2019): questions about a passage that are answered by yes or no, given as options A and B."""

from __future__ import annotations

from hrm_text.eval.few_shot import Choice, choice_task
from hrm_text.eval.task import Dataset, Row


def choice(row: Row) -> Choice:
    """The passage, then the question, which upstream writes small and without its mark."""
    question = f"{row['passage']}\nQuestion: {row['question'].capitalize()}?"
    return Choice(question, ["Yes", "No"], 1 - bool(row["answer"]))


TASK = choice_task(
    "boolq",
    "BoolQ",
    examples=Dataset("google/boolq", split="train"),
    asked=Dataset("google/boolq", split="validation"),
    choice=choice,
    shots=5,
    chance=0.6217,  # of always saying yes
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
