"""The held-out files of a mixture: questions of one file of one source, scored by the final answer."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

from hrm_text.contracts import UserError
from hrm_text.data.procedural import TASKS, answer_of
from hrm_text.data.sources.mixture import read_held_out
from hrm_text.eval.exact import Problem, exact_task
from hrm_text.eval.task import Task


def held_out_task(path: Path, *, limit: int | None = None) -> Task:
    """The first ``limit`` records of ``held_out/<source>/<file>.jsonl``, named by the file.

    Chance is the share of the most frequent answer, what always giving that one would reach, or 0 where none occurs
    twice.

    Raises:
        UserError: the file is missing or holds nothing.
    """
    records = read_held_out(path)[:limit]
    if not records:
        raise UserError(f"{path}: no held-out records to ask")
    problems = []
    for record in records:
        # Our own tasks may show their working first; of other sources the response is the answer.
        found = TASKS.get(record["task"])
        extract = functools.partial(answer_of, found) if found is not None else str.strip
        problems.append(Problem(record["condition"], record["instruction"], record["answer"], extract))
    longest = max(len(record["response"].encode()) for record in records)
    most_frequent = Counter(record["answer"] for record in records).most_common(1)[0][1]
    chance = most_frequent / len(problems) if most_frequent > 1 else 0.0
    return exact_task(path.stem, problems, longest + 1, chance)
