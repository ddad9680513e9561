"""Examples drawn from many tasks by weight, on one side of the split."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from hrm_text.contracts import Example, UserError
from hrm_text.data.procedural.registry import Problem, Task, find_task
from hrm_text.data.procedural.rendering import render
from hrm_text.data.procedural.split import is_held_out

CPU_WEIGHTS: Mapping[str, float] = {
    "add": 12,
    "sub": 14,
    "compare": 7,
    "sudoku4": 12,
    "reverse": 7,
    "vowels": 6,
    "repeat": 5,
    "swap": 5,
    "upper": 4,
    "ends": 4,
    "max": 4,
    "sort": 4,
    "parity": 3,
}
"""Relative frequency of each task in the mixture of the CPU quickstart."""

BATCH = 1024
"""Tasks drawn in one call; drawing them one by one costs more than making some of the examples."""

EXHAUSTED = 500
"""After so many draws in a row of problems seen before, a task is taken to have no others."""


class HeldOutItem(NamedTuple):
    """One question of an evaluation."""

    instruction: str
    condition: str
    answer: str


def generate(
    weights: Mapping[str, float], n: int, seed: int, split: Literal["train", "held_out"] = "train"
) -> Iterator[Example]:
    """``n`` examples of one side of the split: tasks by weight, conditions by each task's shares, wordings evenly.

    The same arguments give the same examples. Problems repeat once a task's space is small against ``n``.

    Raises:
        UserError: an unknown task, or weights that select nothing.
    """
    for name in weights:
        find_task(name)
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"weights {dict(weights)}: expected at least one task, none negative and their sum above 0")
    draws = draw_examples(weights, f"{split} {seed}", held_out=split == "held_out")
    return (example for _, _, example in itertools.islice(draws, n))


def draw_examples(
    weights: Mapping[str, float], seed: int | str, held_out: bool | None = None
) -> Iterator[tuple[Task, Problem, Example]]:
    """Examples without end, each with its task and problem, of one side of the split or, if None, of both."""
    tasks = [find_task(name) for name in weights]
    rng = random.Random(seed)
    conditions = {task.name: tuple(task.conditions) for task in tasks}
    # The last share is open above, so that rounding in the sum can never leave a draw without a condition.
    shares = {task.name: list(itertools.accumulate(task.conditions.values()))[:-1] for task in tasks}
    cumulative = list(itertools.accumulate(weights.values()))
    while True:
        for task in rng.choices(tasks, cum_weights=cumulative, k=BATCH):
            problem = task.sample(rng) if held_out is None else draw(task, rng, held_out)
            condition = conditions[task.name][bisect.bisect(shares[task.name], rng.random())]
            yield task, problem, render(task, problem, condition, int(rng.random() * len(task.wordings)), rng)


def draw(task: Task, rng: random.Random, held_out: bool) -> Problem:
    """The next problem of a task that lies on the given side of the split."""
    while True:
        problem = task.sample(rng)
        if is_held_out(task.name, problem.key) == held_out:
            return problem


def held_out_items(task: str, n: int, seed: int, condition: str) -> list[HeldOutItem]:
    """``n`` distinct held-out problems of a task, all asked under one condition, wordings in turn.

    Fewer come back where the task has fewer held-out problems. The problems depend on the seed alone, so two conditions
    ask the same ones.

    Raises:
        UserError: an unknown task, or a condition that the task cannot be asked under.
    """
    asked = find_task(task)
    unknown = [tag for tag in condition.split(",") if tag not in asked.tags]
    if unknown:
        known = ", ".join(sorted(asked.tags))
        raise UserError(f"task {task!r} has no condition {condition!r}; its tags are {known}")
    rng = random.Random(f"held-out items {seed}")
    problems: dict[str, Problem] = {}
    misses = 0
    while len(problems) < n and misses < EXHAUSTED:
        problem = draw(asked, rng, held_out=True)
        misses = misses + 1 if problem.key in problems else 0
        problems.setdefault(problem.key, problem)
    noise = random.Random(f"noise {seed}")
    items = []
    for i, problem in enumerate(problems.values()):
        example = render(asked, problem, condition, i % len(asked.wordings), noise)
        items.append(HeldOutItem(example.instruction, condition, problem.answer))
    return items
