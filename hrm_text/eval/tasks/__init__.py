"""The tasks by name: from what a user types to questions.

A task is named ``NAME`` or ``NAME:CONDITION``, or is a file of records; the name of a family stands for several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hrm_text.contracts import UserError, did_you_mean
from hrm_text.data import procedural as generators
from hrm_text.data.records import ENDINGS
from hrm_text.eval.runner import EvalTask
from hrm_text.eval.tasks.procedural import procedural_task
from hrm_text.eval.tasks.records import records_task

__all__ = ["FAMILIES", "load_tasks", "procedural_task", "records_task", "task_names"]

FAMILIES: Mapping[str, Sequence[str]] = {
    "quickstart": tuple(generators.CPU_WEIGHTS),
    "procedural": tuple(generators.TASKS),
}
"""Names that stand for several tasks: those that the CPU quickstart trains on, and all that are drawn."""


def task_names() -> list[str]:
    """Every name that ``load_tasks`` knows, families first."""
    return [*FAMILIES, *generators.TASKS]


def load_tasks(names: Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[EvalTask]:
    """The tasks of those names, each once.

    Args:
        names: ``sort``, ``add:direct`` (another condition than the task's usual one), ``quickstart`` (a family) or
            ``questions.jsonl`` (records, exact match on the response).
        limit: most items of a task; None is 200 where items are drawn and all where they are stored.
        seed: of the items that are drawn.

    Raises:
        UserError: an unknown task or condition, a file without usable records, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1 item per task, found {limit}")
    expanded = [each for name in names for each in FAMILIES.get(name, [name])]
    return [_load_task(name, limit, seed) for name in dict.fromkeys(expanded)]


def _load_task(name: str, limit: int | None, seed: int) -> EvalTask:
    if name.endswith(ENDINGS):
        return records_task(Path(name), limit=limit)
    base, colon, condition = name.partition(":")
    if base not in generators.TASKS:
        hint = did_you_mean(base, task_names())
        raise UserError(
            f"unknown task {name!r}: {hint}The tasks are {', '.join(task_names())}, "
            f"and any file of records ending in {' or '.join(ENDINGS)}"
        )
    drawn = {} if limit is None else {"n": limit}
    return procedural_task(base, condition=condition if colon else None, seed=seed, **drawn)
