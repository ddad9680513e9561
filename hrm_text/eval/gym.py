"""Problems of reasoning-gym that no mixture trains on, and their scorers.

Items are drawn from the side of the split by problem that is held out: seeds make no split, as near ones draw the same
items. A level is that of every attribute of a task's curriculum.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.data.procedural.split import is_held_out
from hrm_text.data.sources.reasoning_gym import TASKS as TRAINED
from hrm_text.data.sources.reasoning_gym import by_text, dataset
from hrm_text.eval.scoring.boxed import last_boxed
from hrm_text.eval.task import Question, Scored

SEED = 1
PATIENCE = 100
"""Draws for each item that is wanted: one in ten is held out, and small tasks repeat themselves."""


@functools.cache
def drawn(name: str, level: int) -> Any:
    """The items of a task at a level, by number.

    Raises:
        UserError: reasoning-gym is not installed, or there is no such level.
    """
    try:
        return dataset(name, level, SEED)
    except ImportError:
        raise UserError(
            "the tasks of reasoning-gym need something that is not installed: pip install 'hrm-text[gpu-preset]'"
        ) from None
    except AssertionError as error:
        raise UserError(f"reasoning_gym/{name}/{level}: there is no such level ({error}); use a lower one") from None


def held_out(name: str, level: int, wanted: int, subject: str = "") -> Iterator[Question]:
    """Different problems of one task that no mixture trains on, fewer than wanted where it has fewer."""
    items, seen = drawn(name, level), set[str]()
    for number in range(wanted * PATIENCE):
        entry = items[number]
        asked, answer = entry["question"].strip(), entry["answer"]
        key = TRAINED.get(name, by_text)(asked, str(answer).strip())
        if key not in seen and is_held_out(f"reasoning_gym/{name}", key):
            seen.add(key)
            yield Question(f"{name}/{level}/{number}", asked, answer, subject=subject)
        if len(seen) == wanted:
            return


def score(response: str, question: Question) -> Scored:
    """1 where the task's own scorer gives all of its points; where it gives a part, or fails, 0.

    Of a response with a box its content counts.
    """
    name, level, number = question.id.split("/")
    boxed = last_boxed(response)
    got = (response if boxed is None else boxed).strip()
    items = drawn(name, int(level))
    try:
        right = float(bool(got) and items.score_answer(got, items[int(number)]) == 1.0)
    except Exception:  # of whatever kind: scorers read numbers and grids of responses that hold none
        right = 0.0
    return Scored(right, right, got, readable=bool(got))
