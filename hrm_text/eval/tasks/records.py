"""Any file of records as a task: the response must be given word for word."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

from hrm_text.contracts import UserError
from hrm_text.data.records import BadRecord, read_records
from hrm_text.eval.runner import EvalItem, EvalTask


def records_task(path: Path, *, limit: int | None = None, max_new_tokens: int | None = None) -> EvalTask:
    """The records of a JSONL or Parquet file, each asked under its own condition.

    Chance is the share of the most frequent response, what always giving that one would reach, or 0 where no response
    occurs twice.

    Args:
        path: of the file; also the task's name.
        limit: how many records from the beginning; None is all.
        max_new_tokens: longest response; None is what the longest of the file needs.

    Raises:
        UserError: the file is missing, holds no record, or holds a bad one: skipping it would change the score unseen.
    """
    examples = list(islice(read_records(path, _refuse), limit))
    if not examples:
        raise UserError(f"{path}: no records to evaluate")
    items = [EvalItem(each.condition, each.instruction, each.response) for each in examples]
    if max_new_tokens is None:
        # Byte-level BPE makes no more tokens than bytes; one more, so that a longer response is not cut to a right one.
        max_new_tokens = max(len(each.response.encode()) for each in examples) + 1
    most_frequent = Counter(each.response for each in examples).most_common(1)[0][1]
    return EvalTask(str(path), items, max_new_tokens, most_frequent / len(items) if most_frequent > 1 else 0.0)


def _refuse(bad: BadRecord) -> None:
    raise UserError(f"{bad}; mend or remove it: a score counts every record of its file")
