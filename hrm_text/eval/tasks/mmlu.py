"""MMLU (Hendrycks et al. 2020): multiple choice in 57 subjects, each with examples of its own from the dev split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hrm_text.contracts import UserError
from hrm_text.eval.few_shot import Choice, FewShot
from hrm_text.eval.scoring.letters import score_sole_letter
from hrm_text.eval.task import Dataset, Question, Row, Rows, Task

DEV, TEST = (Dataset("cais/mmlu", config="all", split=split) for split in ("dev", "test"))
FEWER = {"high_school_european_history": 3}
"""Examples where the usual number does not fit: its questions quote long sources."""


def choice(row: Row) -> Choice:
    return Choice(row["question"], row["choices"], row["answer"])


def questions(rows: Rows) -> Iterator[Question]:
    """After the first examples of the subject, which has as many as are asked for."""
    dev = [(row["subject"], choice(row).shot) for row in rows(DEV)]
    few = {name: FewShot([s for n, s in dev if n == name][: FEWER.get(name, TASK.shots)]) for name in dict(dev)}
    asked: dict[str, int] = defaultdict(int)
    for row in rows(TEST):
        subject = row["subject"]
        if subject not in few:
            raise UserError(f"{DEV.hub}: no examples of {subject!r} in the split dev; fetch all of it")
        yield few[subject].choose(choice(row), id=f"{subject}/{asked[subject]}", subject=subject)
        asked[subject] += 1


TASK = Task("mmlu", 1, "MMLU", (DEV, TEST), questions, score_sole_letter, "direct", 1, shots=5, macro=True, chance=0.25)
