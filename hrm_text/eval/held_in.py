"""Whether a benchmark's training split was trained upon: what held-in and held-out mean."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from hrm_text.contracts import UserError
from hrm_text.eval.task import Task
from hrm_text.files import read_json

Held = Literal["in", "out", "unknown"]
"""unknown: of a model whose mixture is not known, or a task that declares no data set."""

RELEASED: Literal["released"] = "released"
"""The mixture of the released checkpoint: it has every source that a task declares."""

Sources = Collection[str] | Literal["released"]


def trained_sources(mixture: Path) -> frozenset[str]:
    """The sources a model was trained upon: of a sampled folder, or the ``sampling.json`` in it.

    A stratum is a file of the records, ``SOURCE__FILE.parquet`` or ``SOURCE.jsonl``; those that no row was drawn from
    do not count.

    Raises:
        UserError: it is neither, or damaged.
    """
    file = mixture / "sampling.json" if mixture.is_dir() else mixture
    found = read_json(file)
    strata = found.get("strata") if isinstance(found, dict) else None
    if not isinstance(strata, list) or not all(isinstance(each, dict) and "name" in each for each in strata):
        raise UserError(f"{file}: expected the sampling.json of a sampled folder (hrm-text data sample), with strata")
    return frozenset(_source(str(each["name"])) for each in strata if each.get("drawn_rows", 0))


def held(task: Task, sources: Sources | None) -> Held:
    """Whether a task's training split is among what a model was trained upon; None: not known."""
    if sources is None or (sources == RELEASED and not (task.held_in or task.datasets)):
        return "unknown"
    if sources == RELEASED:
        return "in" if task.held_in else "out"
    return "in" if not set(task.held_in).isdisjoint(sources) else "out"


def _source(stratum: str) -> str:
    return stratum.partition("__")[0].removesuffix(".gz").removesuffix(".parquet").removesuffix(".jsonl")
