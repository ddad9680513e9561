"""The runner: puts the questions of tasks to an engine and scores the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hrm_text.contracts import Engine, UserError
from hrm_text.eval.metrics import exact_match, wilson_interval

LENGTH_STEP = 32
"""Tasks whose longest responses are the same number of these are asked together."""


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One question with its answer."""

    condition: str
    """Tags that the prompt is given under."""
    prompt: str
    answer: str
    extract_answer: Callable[[str], str] = str.strip
    """Finds the final answer in a response, which may show its working first."""


@dataclass(frozen=True, slots=True)
class EvalTask:
    """Questions that are scored together."""

    name: str
    items: Sequence[EvalItem]
    max_new_tokens: int
    """Longest response: more than a right one needs, or a longer one, cut, would pass for it."""
    chance: float
    """Accuracy that is reached without looking at the question."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What became of one question."""

    task: str
    condition: str
    prompt: str
    expected: str
    response: str
    """As the engine gave it."""
    got: str
    """The answer found in the response."""
    ok: bool


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Exact match over a task."""

    task: str
    n: int
    correct: int
    accuracy: float
    low: float
    """Lower bound of the 95 % Wilson interval."""
    high: float
    chance: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores in the order of the tasks, and every single result in the order of their items."""

    scores: list[TaskScore]
    results: list[ItemResult]

    @property
    def mean_accuracy(self) -> float:
        """Mean over the tasks, each counting the same."""
        return sum(score.accuracy for score in self.scores) / len(self.scores)


def evaluate(
    engine: Engine,
    tasks: Sequence[EvalTask],
    *,
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask every question greedily and score the answers.

    Questions that share a condition and about the same length of response go to the engine together, whatever their
    task.

    Args:
        engine: what answers.
        tasks: with different names, each with at least one item.
        batch_size: questions in one call of the engine.
        on_progress: called after every batch with the questions answered so far and their number in all.

    Raises:
        UserError: no task, a task without items, or two tasks of one name.
    """
    if not tasks:
        raise UserError("no task to evaluate; name at least one")
    names = [task.name for task in tasks]
    for task in tasks:
        if not task.items:
            raise UserError(f"task {task.name!r} has no items to evaluate")
        if names.count(task.name) > 1:
            raise UserError(f"two tasks are called {task.name!r}; their scores could not be told apart")
    items = [(task, item) for task in tasks for item in task.items]
    groups: dict[tuple[str, int], list[int]] = {}
    for number, (task, item) in enumerate(items):
        # Rounded up, so that tasks share batches: a few tokens more than needed change no right answer.
        length = math.ceil(task.max_new_tokens / LENGTH_STEP) * LENGTH_STEP
        groups.setdefault((item.condition, length), []).append(number)

    responses: dict[int, str] = {}
    for (condition, max_new_tokens), numbers in groups.items():
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            prompts = [items[number][1].prompt for number in batch]
            answers = engine.generate(prompts, condition=condition, max_new_tokens=max_new_tokens)
            responses.update(zip(batch, answers, strict=True))
            if on_progress is not None:
                on_progress(len(responses), len(items))

    results = [_score_item(task.name, item, responses[number]) for number, (task, item) in enumerate(items)]
    return Evaluation([_score_task(task, results) for task in tasks], results)


def _score_item(task: str, item: EvalItem, response: str) -> ItemResult:
    got = item.extract_answer(response)
    return ItemResult(task, item.condition, item.prompt, item.answer, response, got, exact_match(got, item.answer))


def _score_task(task: EvalTask, results: Sequence[ItemResult]) -> TaskScore:
    of_task = [result.ok for result in results if result.task == task.name]
    n, correct = len(of_task), sum(of_task)
    return TaskScore(task.name, n, correct, correct / n, *wilson_interval(correct, n), task.chance)
