"""Questions of our own as a task of the evaluation: right is what is given word for word."""

from __future__ import annotations

from hrm_text.eval.metrics import exact_match
from hrm_text.eval.runner import EvalTask
from hrm_text.eval.task import Question, Rows, Scored, Task

OWN_CONDITION = "its own"
"""In the place of a condition, where the questions of a task have several."""


def exact_task(task: EvalTask, condition: str | None = None) -> Task:
    """Procedural problems, or records, as a ``Task``: its items are there already, so it reads no data set.

    Args:
        task: with the items.
        condition: to ask all under; None is that of each item.
    """
    conditions = {item.condition for item in task.items}
    label = condition or (conditions.pop() if len(conditions) == 1 else OWN_CONDITION)
    asked = [Question(str(number), item.prompt, item.answer) for number, item in enumerate(task.items)]
    if condition is None and label == OWN_CONDITION:
        pairs = zip(asked, task.items, strict=True)
        asked = [Question(each.id, each.prompt, each.answer, condition=item.condition) for each, item in pairs]

    def questions(rows: Rows) -> list[Question]:
        return asked

    def score(response: str, question: Question) -> Scored:
        got = task.items[int(question.id)].extract_answer(response)
        right = float(exact_match(got, question.answer))
        return Scored(right, right, got, readable=bool(got))

    return Task(
        name=task.name,
        version=1,
        title=f"{task.name}: exact match",
        datasets=(),
        questions=questions,
        score=score,
        condition=label,
        max_new_tokens=task.max_new_tokens,
        chance=task.chance,
    )
