"""The tasks by name: from what a user types to questions.

A task is named ``NAME`` or ``NAME:CONDITION``, or is a file of records; the name of a family stands for several.
Every module here with a ``TASK``, or several in ``TASKS``, is a benchmark; its own name stands for all of its tasks.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from hrm_text.contracts import UserError, did_you_mean
from hrm_text.data import procedural as generators
from hrm_text.data.prompt import parse_condition
from hrm_text.data.records import ENDINGS
from hrm_text.eval.scoring.letters import score_last_letter
from hrm_text.eval.task import Task
from hrm_text.eval.tasks.procedural import procedural_task
from hrm_text.eval.tasks.records import records_task

__all__ = ["FAMILIES", "find_tasks", "procedural_task", "records_task", "task_names"]

FAMILIES: Mapping[str, Sequence[str]] = {
    "quickstart": tuple(generators.CPU_WEIGHTS),
    "procedural": tuple(generators.TASKS),
    "published": ("gsm8k", "math", "drop", "mmlu", "arc_challenge", "hellaswag", "winogrande", "boolq"),
}
"""Names that stand for several tasks: those that the CPU quickstart trains on, all that are drawn, and the benchmarks
whose scores were published."""

DRAWN = 200
"""Questions of a task that draws them, where no number is asked for."""


@cache
def benchmarks() -> Mapping[str, tuple[Task, ...]]:
    """The tasks of every benchmark by its module's name; imported here, as nobody needs them before."""
    found = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")):
        imported = importlib.import_module(f"{__name__}.{module}")
        named = (*getattr(imported, "TASKS", ()), getattr(imported, "TASK", None))
        if tasks := tuple(task for task in named if isinstance(task, Task)):
            found[module] = tasks
    return found


def benchmark_tasks() -> dict[str, Task]:
    """Every benchmark's task by its name."""
    return {task.name: task for tasks in benchmarks().values() for task in tasks}


def task_names() -> list[str]:
    """Every name that ``find_tasks`` knows, families first."""
    return [*dict.fromkeys((*FAMILIES, *generators.TASKS, *benchmarks(), *benchmark_tasks()))]


def find_tasks(
    names: Sequence[str], *, conditions: Sequence[str] = (), limit: int | None = None, seed: int = 0
) -> list[Task]:
    """The tasks of those names, each once and under its condition; or once under each of ``conditions``.

    Args:
        names: ``gsm8k``, ``add:direct`` or ``gsm8k:synth+cot`` (another condition than the task's usual one),
            ``published`` (a family) or ``questions.jsonl`` (records, exact match on the response).
        conditions: a grid: every task is asked under each of them, such as ``synth,cot``.
        limit: how many questions are drawn, where they are; None is 200.
        seed: of the questions that are drawn.

    Raises:
        UserError: an unknown task or condition, one named twice, a file without usable records, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected at least 1 item per task, found {limit}")
    grid = [",".join(parse_condition(condition)) for condition in conditions]
    expanded = dict.fromkeys(each for name in names for each in _members(name))
    if grid:
        for name in expanded:
            if ":" in name and not name.endswith(ENDINGS):
                raise UserError(f"{name!r} names a condition, and so does --conditions; leave out one of them")
        return [_find(name, condition, limit, seed) for name in expanded for condition in dict.fromkeys(grid)]
    return [_find(name, None, limit, seed) for name in expanded]


def _members(name: str) -> Sequence[str]:
    """The names that a name stands for, each with the condition behind it."""
    if name.endswith(ENDINGS):
        return [name]
    base, colon, condition = name.partition(":")
    if base in FAMILIES:
        found: Sequence[str] = FAMILIES[base]
    elif base not in generators.TASKS and base in benchmarks() and base not in benchmark_tasks():
        found = [task.name for task in benchmarks()[base]]
    else:
        return [name]
    return [f"{each}{colon}{condition}" for each in found]


def _find(name: str, condition: str | None, limit: int | None, seed: int) -> Task:
    if name.endswith(ENDINGS):
        return records_task(Path(name), condition)
    base, colon, named = name.partition(":")
    under = condition if condition is not None else named.replace("+", ",") if colon else None
    if base in generators.TASKS:
        drawn = DRAWN if limit is None else limit
        return replace(procedural_task(base, condition=under, n=drawn, seed=seed), name=name)
    if base in (known := benchmark_tasks()):
        return known[base] if under is None else _asked_under(known[base], parse_condition(under))
    raise _unknown(name)


def _asked_under(task: Task, tags: Sequence[str]) -> Task:
    """The task under another condition. With working to show, a letter is not the first token but the last one said."""
    task = replace(task, condition=",".join(tags))
    if "cot" in tags and task.max_new_tokens == 1:
        return replace(task, max_new_tokens=task.context, score=score_last_letter)
    return task


def _unknown(name: str) -> UserError:
    hint = did_you_mean(name.partition(":")[0], task_names())
    single = [known for known in task_names() if "/" not in known]  # reasoning_gym/NAME/LEVEL are three hundred
    return UserError(
        f"unknown task {name!r}: {hint}The tasks are {', '.join(single)}, "
        f"and any file of records ending in {' or '.join(ENDINGS)}"
    )
