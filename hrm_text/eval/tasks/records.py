"""Any file of records as a task: the response must be given word for word."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hrm_text.contracts import UserError
from hrm_text.data.records import BadRecord, read_records
from hrm_text.eval.exact import Problem, exact_task
from hrm_text.eval.task import Task


def records_task(path: Path, condition: str | None = None) -> Task:
    """The records of a JSONL or Parquet file.

    Chance is the share of the most frequent response, what always giving that one would reach, or 0 where no response
    occurs twice.

    Args:
        path: of the file; also the task's name.
        condition: to ask all under; None is that of each record.

    Raises:
        UserError: the file is missing, holds no record, or holds a bad one: skipping it would change the score unseen.
    """
    examples = list(read_records(path, _refuse))
    if not examples:
        raise UserError(f"{path}: no records to evaluate")
    problems = [Problem(each.condition, each.instruction, each.response) for each in examples]
    # Byte-level BPE makes no more tokens than bytes; one more, so that a longer response is not cut to a right one.
    longest = max(len(each.response.encode()) for each in examples) + 1
    most_frequent = Counter(each.response for each in examples).most_common(1)[0][1]
    chance = most_frequent / len(problems) if most_frequent > 1 else 0.0
    return exact_task(str(path), problems, longest, chance, condition)


def _refuse(bad: BadRecord) -> None:
    raise UserError(f"{bad}; mend or remove it: a score counts every record of its file")
