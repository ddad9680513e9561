"""The tasks of reasoning-gym (Stojanovski et al. 2025) by name and level: ``reasoning_gym/gcd/2``.

``reasoning_gym`` alone is the mean over the tasks of the mixture ``gpu-preset`` at the lowest level.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from hrm_text.data.sources.reasoning_gym import TASKS as TRAINED
from hrm_text.eval.gym import held_out, score
from hrm_text.eval.subtasks import REASONING_GYM
from hrm_text.eval.task import Question, Rows, Task

LEVELS = (0, 1, 2, 3)
ITEMS, ITEMS_EACH = 200, 50
"""Of one task; where several tasks are one."""
make = functools.partial(Task, version=1, datasets=(), score=score, condition="direct", max_new_tokens=512)


def one(name: str, level: int) -> Task:
    def questions(rows: Rows) -> Iterator[Question]:
        return held_out(name, level, ITEMS)

    title = f"reasoning-gym: {name}, level {level}"
    return make(f"reasoning_gym/{name}/{level}", title=title, questions=questions)


def mixture(rows: Rows) -> Iterator[Question]:
    for name in TRAINED:
        yield from held_out(name, 0, ITEMS_EACH, subject=name)


TITLE = "reasoning-gym: the mixture's tasks, level 0"
ALL = make("reasoning_gym", title=TITLE, questions=mixture, macro=True, held_in=("reasoning_gym",))
TASKS = (ALL, *(one(name, level) for name in REASONING_GYM for level in LEVELS))
