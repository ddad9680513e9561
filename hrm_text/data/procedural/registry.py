"""The tasks: what one is, and the table that the family modules fill."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hrm_text.contracts import CONDITIONS, UserError, did_you_mean


@dataclass(frozen=True, slots=True)
class Problem:
    """One instance of a task, free of wording.

    ``key`` is its canonical text: two problems whose answers follow from one another (12 + 34 and 34 + 12) share it, so
    that they fall on the same side of the split. ``fields`` are what wordings, steps and sentences may show of it.
    """

    key: str
    fields: Mapping[str, Any]
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of problems with one way of drawing them and several of asking and answering."""

    name: str
    description: str
    chance: float
    """Accuracy of guessing: always the most common answer, or one of those that the question offers."""
    wordings: tuple[str, ...]
    """``str.format`` templates of the instruction over the problem's fields."""
    conditions: Mapping[str, float]
    """Share of each condition in the training mixture; they sum to 1."""
    sample: Callable[[random.Random], Problem]
    sentence: str
    """Template of an answer in a sentence (tag ``synth``): it ends with ``{answer}.`` and words before it."""
    steps: Callable[..., str] | None = None
    """From the problem's fields to the working that precedes the answer (tag ``cot``)."""
    tags: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        tags = frozenset(tag for condition in self.conditions for tag in condition.split(","))
        object.__setattr__(self, "tags", tags)
        assert self.tags <= set(CONDITIONS), f"{self.name}: {self.tags} not within {CONDITIONS}"
        assert ("cot" in self.tags) <= (self.steps is not None), f"{self.name}: the tag cot needs steps"
        assert abs(sum(self.conditions.values()) - 1) < 1e-9, f"{self.name}: the shares do not sum to 1"
        assert self.sentence.endswith("{answer}.") and self.lead_in.strip(), f"{self.name}: {self.sentence!r}"

    @property
    def lead_in(self) -> str:
        """The words of ``sentence`` right before the answer: where a reader finds it."""
        return self.sentence.removesuffix("{answer}.").rpartition("}")[2]


TASKS: dict[str, Task] = {}
"""Every task by name, in the order in which the families register them."""


def task(
    name: str,
    *,
    chance: float,
    wordings: tuple[str, ...],
    conditions: Mapping[str, float],
    sentence: str,
    steps: Callable[..., str] | None = None,
) -> Callable[[Callable[[random.Random], Problem]], Callable[[random.Random], Problem]]:
    """Register the decorated sampler as a task; the first line of its docstring is the description."""

    def register(sample: Callable[[random.Random], Problem]) -> Callable[[random.Random], Problem]:
        assert name not in TASKS, f"task {name!r} is registered twice"
        description = (sample.__doc__ or "").partition("\n")[0].rstrip(".")
        TASKS[name] = Task(name, description, chance, wordings, dict(conditions), sample, sentence, steps)
        return sample

    return register


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the message suggests a close one and lists all.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise UserError(f"unknown task {name!r}: {hint}The tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]
