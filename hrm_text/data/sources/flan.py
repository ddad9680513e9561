"""The FLAN collection (Longpre et al. 2023): five mixtures of tasks, each with and without examples in the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hrm_text.contracts import Example
from hrm_text.data.sources.pairs import pair, text
from hrm_text.data.sources.upstream import CleanRow, Drop, Hub, Row, dataset


class Subset(NamedTuple):
    """One of the ten subsets."""

    mixture: str
    shots: str
    folders: tuple[str, ...]
    rows: int

    @property
    def name(self) -> str:
        return f"flan_{self.mixture}_{self.shots}"

    @property
    def condition(self) -> str:
        return "cot" if self.mixture == "cot" else "direct"


SUBSETS = (
    Subset("cot", "fs", ("cot_fsopt_data",), 182_904),
    Subset("cot", "zs", ("cot_zsopt_data",), 95_570),
    Subset("dialog", "fs", ("dialog_fsopt_data",), 5_425_015),
    Subset("dialog", "zs", ("dialog_zsopt_data",), 2_715_160),
    Subset("flan2021", "fs", ("flan_fsopt_data", "flan_fsnoopt_data"), 98_486_545),
    Subset("flan2021", "zs", ("flan_zsopt_data", "flan_zsnoopt_data"), 76_355_570),
    Subset("niv2", "fs", ("niv2_fsopt_data",), 10_058_408),
    Subset("niv2", "zs", ("niv2_zsopt_data",), 5_030_900),
    Subset("t0", "fs", ("t0_fsopt_data", "t0_fsnoopt_data"), 98_094_194),
    Subset("t0", "zs", ("t0_zsopt_data", "t0_zsnoopt_data"), 81_315_008),
)
"""Folders of the repository: ``fs`` has examples in the prompt, ``zs`` has none; ``noopt`` leaves the options of a
multiple choice out."""

BYTES_A_ROW = {"fs": 1000, "zs": 400}
"""Compressed: an estimate."""

COLUMNS = {"inputs": "string", "targets": "string", "_task_name": "string", "_template_type": "string or null"}


def stratum(row: Row) -> str:
    """The task, apart for each kind of template: the mixture caps the rows of every one of them."""
    return "__".join(filter(None, (text(row, "_template_type"), text(row, "_task_name")))) or "unnamed"


def _cleaner(subset: Subset) -> CleanRow:
    def clean(row: Row) -> Iterator[Example | Drop]:
        yield pair(subset.condition, text(row, "inputs"), text(row, "targets"))

    shots = {"fs": "examples in the prompt", "zs": "no example in the prompt"}[subset.shots]
    clean.__doc__ = f"FLAN, mixture {subset.mixture}, {shots}."
    return clean


for _subset in SUBSETS:
    dataset(
        _subset.name,
        group="general instruction",
        licence="CC-BY-4.0",
        home="https://huggingface.co/datasets/Open-Orca/FLAN",
        condition=_subset.condition,
        columns=COLUMNS,
        files=tuple(f"**/{folder}/*.parquet" for folder in _subset.folders),
        hub=Hub("Open-Orca/FLAN", data_files=tuple(f"{folder}/*.parquet" for folder in _subset.folders)),
        rows=_subset.rows,
        megabytes=max(1, _subset.rows * BYTES_A_ROW[_subset.shots] // 10**6),
        stratum=stratum,
    )(_cleaner(_subset))
