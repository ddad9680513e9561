"""Held-out problems of the procedural generators."""

from __future__ import annotations

import functools
import random

from hrm_text.data.procedural import Task as Generator
from hrm_text.data.procedural import answer_of, find_task, held_out_items
from hrm_text.data.procedural.rendering import render
from hrm_text.eval.exact import Problem, exact_task
from hrm_text.eval.task import Task

DRAWS = 200
"""Problems looked at for the longest response that shows working or is a sentence."""


def procedural_task(name: str, *, condition: str | None = None, n: int = 200, seed: int = 0) -> Task:
    """``n`` held-out problems of one generator, fewer where it has fewer, scored by the answer its rule finds.

    Args:
        name: of the generator.
        condition: to ask under; None is the one that most of its training examples have.
        n: how many problems.
        seed: of the problems: the same for every condition.

    Raises:
        UserError: an unknown generator, or a condition that it cannot be asked under.
    """
    task = find_task(name)
    asked_under = max(task.conditions, key=lambda each: task.conditions[each]) if condition is None else condition
    label = name if condition is None else f"{name}:{condition}"
    extract_answer = functools.partial(answer_of, task)
    problems = [
        Problem(item.condition, item.instruction, item.answer, extract_answer)
        for item in held_out_items(name, n, seed, asked_under)
    ]
    if {"cot", "synth"}.isdisjoint(asked_under.split(",")):
        longest = max((len(item.answer.encode()) for item in problems), default=0)
    else:
        longest = longest_response(task, asked_under)
    # One more than the longest, so that a longer response is not cut to a right one.
    return exact_task(label, problems, longest + 1, task.chance, asked_under)


def longest_response(task: Generator, condition: str) -> int:
    """Tokens that suffice for a right response under a condition: byte-level BPE makes no more tokens than bytes."""
    rng = random.Random(0)
    # From both sides of the split: a held-out problem costs ten draws, and a length gives nothing away.
    examples = (render(task, task.sample(rng), condition, 0, rng) for _ in range(DRAWS))
    return max(len(example.response.encode()) for example in examples)
