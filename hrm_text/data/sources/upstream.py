"""Public datasets: what one is, and the table of all. A cleaner turns one row into examples, or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hrm_text.contracts import Example, UserError, did_you_mean

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a row, or a part of it, becomes no example."""

    reason: str
    """A few fixed words: dropped rows are counted by it."""


CleanRow = Callable[[Row], Iterable[Example | Drop]]

TextLayout = Literal["alternating", "problem_answer"]
"""alternating: a line with a question, a line with its answer, and so on. problem_answer: a line ``Problem:`` before
each question and a line ``Answer:`` before its answer."""


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the ``datasets`` library finds a dataset."""

    repo: str
    split: str = "train"
    config: str | None = None
    data_files: tuple[str, ...] = ()
    """Glob patterns below the repository, where only some of its files are meant; all of the split without any."""


@dataclass(frozen=True)
class Dataset:
    """A registered cleaner of a public dataset."""

    name: str
    group: str
    """Of the released mixture's table, such as ``mathematics``."""
    description: str
    licence: str
    home: str
    """Where people read about it and fetch it."""
    condition: str
    """The rule in words: which tags its examples get, and when."""
    columns: Mapping[str, str]
    """Every column or key that is read, and its type: string, number, boolean, list, object or null, or several joined
    by " or ". A row that lacks one, or has another type there, is dropped and counted. A column that may be null
    may be missing too."""
    files: tuple[str, ...]
    """Glob patterns of its files below the local folder, in the upstream layout."""
    hub: Hub | None
    """None: it is not on the hub in this form, and ``home`` says where to fetch it."""
    rows: int
    """About how many there are."""
    megabytes: int
    """About how much there is to fetch."""
    clean: CleanRow
    stratum: Callable[[Row], str] | None = None
    """The name of a row's stratum (its task), where one file holds several; None: every file is one stratum."""
    text: TextLayout | None = None
    """How its .txt files are laid out; they give the columns question and answer. None: it has none."""
    one_row_per_file: bool = False
    """Every file holds one problem, so all the files of a folder become one file of records, one stratum."""


DATASETS: dict[str, Dataset] = {}
"""Every dataset by name; filled by the modules of this package."""


def dataset(name: str, **about: Any) -> Callable[[CleanRow], CleanRow]:
    """Register the decorated cleaner; the first line of its docstring is the description, the rest are its fields."""

    def register(clean: CleanRow) -> CleanRow:
        assert name not in DATASETS, f"dataset {name!r} is registered twice"
        description = (clean.__doc__ or "").partition("\n")[0].rstrip(".")
        DATASETS[name] = Dataset(name=name, description=description, clean=clean, **about)
        return clean

    return register


def find_dataset(name: str) -> Dataset:
    """The dataset of that name.

    Raises:
        UserError: there is none; the message suggests a close one and lists all.
    """
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise UserError(f"unknown dataset {name!r}: {hint}The datasets are {', '.join(sorted(DATASETS))}")
    return DATASETS[name]
