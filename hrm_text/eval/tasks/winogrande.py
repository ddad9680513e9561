"""WinoGrande (Sakaguchi et al. 2019), trained on the debiased part: which of two names fills the gap of a sentence."""

from __future__ import annotations

from hrm_text.eval.few_shot import Choice, choice_task
from hrm_text.eval.task import Dataset, Row

TRAIN, VALIDATION = (
    Dataset("allenai/winogrande", config="winogrande_debiased", split=split) for split in ("train", "validation")
)


def choice(row: Row) -> Choice:
    """The sentence with its gap, and what may fill it; upstream counts options from 1."""
    return Choice(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


TASK = choice_task(
    "winogrande",
    "WinoGrande",
    examples=TRAIN,
    asked=VALIDATION,
    choice=choice,
    shots=5,
    chance=0.5,
    held_in=("flan_flan2021_fs", "flan_flan2021_zs"),
)
