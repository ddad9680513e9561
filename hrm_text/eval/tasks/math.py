r"""MATH (Hendrycks et al. 2021): competition problems of seven subjects; the answer is in the last ``\boxed``."""

from __future__ import annotations

from collections.abc import Iterator

from hrm_text.contracts import UserError
from hrm_text.eval.scoring.boxed import last_boxed
from hrm_text.eval.scoring.maths import score_maths
from hrm_text.eval.task import Dataset, Question, Rows, Task

SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
TESTS = tuple(Dataset("EleutherAI/hendrycks_math", config=subject) for subject in SUBJECTS.split())


def questions(rows: Rows) -> Iterator[Question]:
    """The problem alone; the answer is the last box of the solution."""
    for test in TESTS:
        for index, row in enumerate(rows(test)):
            name, answer = f"{test.config}/{index}", last_boxed(row["solution"])
            if not answer:
                raise UserError(
                    rf"{test.hub}, {name}: expected a solution with \boxed{{...}}; fetch the data set again"
                )
            yield Question(name, row["problem"].strip(), answer, subject=test.config or "")


TASK = Task(
    name="math",
    version=1,
    title="MATH",
    datasets=TESTS,
    questions=questions,
    score=score_maths,
    condition="synth,cot",
    max_new_tokens=3072,
    context=3072,
    held_in=("math_train", "math_train_answers"),
)
