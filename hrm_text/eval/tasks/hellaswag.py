"""HellaSwag (Zellers et al. 2019): which of four endings continues a description of everyday life."""

from __future__ import annotations

from hrm_text.eval.few_shot import Choice, choice_task
from hrm_text.eval.task import Dataset, Row


def choice(row: Row) -> Choice:
    """The context with what the endings have in common, then the question."""
    text = f"{row['ctx_a']} {row['ctx_b'].capitalize()}\nQuestion: Which ending follows best?"
    return Choice(text, row["endings"], int(row["label"]))


TASK = choice_task(
    "hellaswag",
    "HellaSwag",
    examples=Dataset("Rowan/hellaswag", split="train"),
    asked=Dataset("Rowan/hellaswag", split="validation"),
    choice=choice,
    shots=10,
    chance=0.25,
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
