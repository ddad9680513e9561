"""Questions of our own as a task: right is what is given word for word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hrm_text.contracts import UserError
from hrm_text.eval.metrics import exact_match
from hrm_text.eval.task import Question, Rows, Scored, Task

OWN_CONDITION = "its own"
"""In the place of a condition, where the questions of a task have several."""


class Problem(NamedTuple):
    """One question with its answer."""

    condition: str
    """Tags that it is asked under."""
    prompt: str
    answer: str
    extract_answer: Callable[[str], str] = str.strip
    """Finds the final answer in a response, which may show its working first."""


def exact_task(
    name: str, problems: Sequence[Problem], max_new_tokens: int, chance: float, condition: str | None = None
) -> Task:
    """A task of problems that are there already, so that it reads no data set.

    Args:
        name: of the task.
        problems: in the order in which they are asked.
        max_new_tokens: more than a right response needs, or a longer one, cut, would pass for it.
        chance: accuracy that is reached without looking at the question.
        condition: to ask all under; None is that of each problem.
    """
    conditions = {problem.condition for problem in problems} if condition is None else {condition}
    label = conditions.pop() if len(conditions) == 1 else OWN_CONDITION

    def questions(rows: Rows) -> list[Question]:
        return [
            Question(str(number), each.prompt, each.answer, condition=each.condition if label == OWN_CONDITION else "")
            for number, each in enumerate(problems)
        ]

    def score(response: str, question: Question) -> Scored:
        got = problems[int(question.id)].extract_answer(response)
        right = float(exact_match(got, question.answer))
        return Scored(right, right, got, readable=bool(got))

    title = f"{name}: exact match"
    return Task(name, 1, title, (), questions, score, label, max_new_tokens=max_new_tokens, chance=chance)


def given_questions(task: Task) -> list[Question]:
    """The questions of a task that reads no data set."""

    def nowhere(dataset: object, /) -> list[dict[str, object]]:
        raise UserError(f"task {task.name!r} reads a data set; evaluate it with a source of rows")

    return list(task.questions(nowhere))
