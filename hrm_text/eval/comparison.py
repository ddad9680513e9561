"""Two runs of the same questions, compared question by question."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.eval.statistics import Paired, mean, paired
from hrm_text.files import read_json

_Scores = dict[str, dict[str, list[float]]]
"""Strict scores of all samples by question, by what a task is called in ``results.json``."""


@dataclass(frozen=True, slots=True)
class Row:
    """A task under a condition."""

    task: str
    condition: str
    first: float
    """Mean strict score over the questions."""
    second: float
    paired: Paired


def compare(first: Path, second: Path) -> list[Row]:
    """What the answers of two finished runs say, for each task and condition that both asked.

    Scores are strict, and of a question with several samples their mean.

    Raises:
        UserError: a run is not finished; or a task was asked differently, or both have none in common.
    """
    results = [read_json(folder / "results.json") for folder in (first, second)]
    tasks = [found["tasks"] for found in results]
    scores = [_scores(folder) for folder in (first, second)]
    rows = []
    for name in (name for name in tasks[0] if name in tasks[1]):
        _refuse_other_questions(name, tasks[0][name], tasks[1][name])
        a, b = ([mean(values) for _, values in sorted(found[name].items())] for found in scores)
        task, _, condition = name.rpartition(" under ")
        rows.append(Row(task, condition, mean(a), mean(b), paired(a, b)))
    if not rows:
        raise UserError(f"{first} and {second}: have no task in common")
    return rows


def _refuse_other_questions(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    for key in ("version", "questions_sha256", "samples", "max_new_tokens", "context", "shots"):
        if first[key] != second[key]:
            raise UserError(
                f"{name}: the two runs differ in {key}, {first[key]} and {second[key]}; "
                "evaluate both with the same version of this package, the same data, --limit and --seed"
            )


def _scores(folder: Path) -> _Scores:
    scores: _Scores = defaultdict(lambda: defaultdict(list))
    for line in (folder / "answers.jsonl").read_bytes().splitlines():
        found = json.loads(line)
        scores[f"{found['task']} under {found['condition']}"][found["id"]].append(found["strict"])
    return scores
