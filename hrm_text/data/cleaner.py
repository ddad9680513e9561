"""One shard of a public dataset: its rows become examples, and whatever does not is counted with its reason."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import hrm_text.data.sources  # noqa: F401  it fills DATASETS
from hrm_text.contracts import CONDITIONS, Example, UserError
from hrm_text.data.filters import Filter, find_filters
from hrm_text.data.prompt import strip_thinking
from hrm_text.data.sources.upstream import Dataset, Drop
from hrm_text.data.sources.upstream_files import BadRow, NumberedRow, read_rows
from hrm_text.data.sources.upstream_hub import HubShard, read_hub_rows

MOST_CHARACTERS = 1 << 26
"""Of an example: a longer one is dropped, so that a batch of examples is bounded."""

_VERSION = 1
"""Of the readers and of this module: another number cleans everything again."""

_EXAMPLES_PER_REASON = 3
_MOST_REASONS = 200


@dataclass(frozen=True, slots=True)
class CleanSettings:
    """What decides, besides the dataset, what comes out."""

    filters: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    """Files of your own cleaners."""


@dataclass(frozen=True, slots=True)
class CleanShard:
    """An upstream file, a folder of one-row files, or a shard on the hub: what one worker goes through at a time."""

    dataset: str
    name: str
    """Its place below the dataset's folder, without endings."""
    root: Path | None
    """The dataset's local folder; None on the hub."""
    source: Path | HubShard
    out: Path
    """The dataset's folder of records."""
    stamp: Mapping[str, Any]
    """What decides what comes out: a report with another stamp is of another run."""
    settings: CleanSettings
    bytes: int
    """Of the source: the shard's weight."""

    @property
    def report(self) -> Path:
        return self.out / ".reports" / f"{self.name}.json"

    @property
    def records(self) -> Path:
        return self.out / f"{self.name}.parquet"

    @property
    def part(self) -> Path:
        """Where its examples lie until they are gathered, where a dataset has strata."""
        return self.out / ".parts" / f"{self.name}.arrow"


@dataclass(slots=True)
class Tally:
    """What became of the rows of a shard."""

    rows: int = 0
    kept: int = 0
    characters: int = 0
    """Of the instructions and responses of the kept examples."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason. A row that gives several examples can be dropped in part."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few places of each reason, as FILE:LINE."""

    def drop(self, reason: str, place: str) -> None:
        """Count what is dropped."""
        # Reasons are few and fixed, but a cleaner of your own may not know that.
        if reason not in self.dropped and len(self.dropped) >= _MOST_REASONS:
            reason = "other reasons"
        self.dropped[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES_PER_REASON:
            places.append(place)

    def add(self, other: Tally) -> None:
        """Take another shard's in."""
        self.rows += other.rows
        self.kept += other.kept
        self.characters += other.characters
        self.dropped.update(other.dropped)
        for reason, places in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine.extend(places[: _EXAMPLES_PER_REASON - len(mine)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the most frequent reason first."""
        order = sorted(self.dropped, key=lambda reason: (-self.dropped[reason], reason))
        return {
            "rows": self.rows,
            "kept": self.kept,
            "characters": self.characters,
            "dropped": {reason: self.dropped[reason] for reason in order},
            "examples": {reason: self.examples[reason] for reason in order},
        }

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> Tally:
        """The reverse of ``as_dict``."""
        examples = {reason: list(places) for reason, places in about["examples"].items()}
        return cls(about["rows"], about["kept"], about["characters"], Counter(about["dropped"]), examples)


class Cleaned(NamedTuple):
    """An example and the stratum it belongs to, empty where the whole file is one."""

    stratum: str
    example: Example


def clean_rows(shard: CleanShard, found: Dataset, tally: Tally) -> Iterator[Cleaned]:
    """The examples of a shard, in the order of its rows; ``tally`` counts along.

    Raises:
        UserError: the source cannot be read, or there is no such filter.
    """
    filters = find_filters(shard.settings.filters)
    for place, located in _located_rows(shard, found, tally):
        tally.rows += 1
        anything = False
        try:
            stratum = found.stratum(located.row) if found.stratum is not None else ""
            if not isinstance(stratum, str):
                raise TypeError("a stratum is a string")
            for cleaned in found.clean(located.row):
                anything = True
                reason = cleaned.reason if isinstance(cleaned, Drop) else _why_not(cleaned, filters)
                if reason is not None:
                    tally.drop(reason, place)
                    continue
                assert isinstance(cleaned, Example)
                tally.kept += 1
                tally.characters += len(cleaned.instruction) + len(cleaned.response)
                yield Cleaned(stratum, cleaned)
        except UserError:
            raise
        # Columns have their types, but what lies in lists and objects has been checked by nobody: a surprise there
        # costs the row, not the run. The summary shows it, and where.
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            tally.drop(f"the cleaner raised {type(error).__name__}", place)
            continue
        if not anything:
            tally.drop("the cleaner gave nothing", place)


def _why_not(example: Any, filters: Sequence[Filter]) -> str | None:
    """Why what a cleaner gave cannot be a record, or which filter is against it."""
    if not isinstance(example, Example):
        return f"the cleaner gave a {type(example).__name__}"
    condition, instruction, response = example.condition, example.instruction, example.response
    if not type(condition) is type(instruction) is type(response) is str:
        return "a field is no string"
    if not _is_condition(condition):
        return "unknown condition"
    if len(instruction) + len(response) > MOST_CHARACTERS:
        return "example too long"
    if not instruction.strip():
        return "empty instruction"
    if not response.strip():
        return "empty response"
    if "<think>" in response and not strip_thinking(response).strip():
        return "nothing but thinking in the response"
    if not (instruction.isascii() or _is_encodable(instruction)) or not (response.isascii() or _is_encodable(response)):
        return "not valid Unicode"
    for look in filters:
        reason = look(example)
        if reason is not None:
            return reason
    return None


@lru_cache(maxsize=1024)
def _is_condition(condition: str) -> bool:
    return all(tag.strip() in CONDITIONS for tag in condition.split(","))


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _located_rows(shard: CleanShard, found: Dataset, tally: Tally) -> Iterator[tuple[str, NumberedRow]]:
    """The usable rows of all files of a shard, each with its place; the others are counted."""

    def on_bad(file: str) -> Callable[[BadRow], None]:
        def count(bad: BadRow) -> None:
            tally.rows += 1
            tally.drop(bad.reason, f"{file}:{bad.line}")

        return count

    if isinstance(shard.source, HubShard):
        name = f"{shard.source.hub.repo}/{shard.source.name}"
        for located in read_hub_rows(shard.source, found.columns, on_bad(name)):
            yield f"{name}:{located.line}", located
        return
    assert shard.root is not None
    files = files_of_folder(shard.source, found.files) if found.one_row_per_file else [shard.source]
    for path in files:
        # Places are relative, so that the same data in another folder gives the same report.
        name = path.relative_to(shard.root).as_posix()
        for located in read_rows(path, found.columns, on_bad(name), found.text):
            yield f"{name}:{located.line}", located


def files_of_folder(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files right in a folder whose names fit the last part of a pattern, sorted by name."""
    names = {pattern.rpartition("/")[2] for pattern in patterns}
    try:
        found = [path for path in folder.iterdir() if any(fnmatch(path.name, name) for name in names)]
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder; was it moved or deleted while it was being read?") from None
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def cleaner_stamp(found: Dataset, settings: CleanSettings) -> dict[str, Any]:
    """What the examples depend on besides their source: the cleaner's code, the filters and theirs."""
    codes = [_code(found.clean), *([_code(found.stratum)] if found.stratum is not None else [])]
    filters = [(name, _code(look)) for name, look in zip(settings.filters, find_filters(settings.filters), strict=True)]
    about = (_VERSION, found.name, dict(found.columns), found.text, codes, filters)
    return {"cleaner": hashlib.sha256(repr(about).encode()).hexdigest(), "filters": list(settings.filters)}


def _code(function: Callable[..., Any]) -> str:
    """A hash of the file a function is in, and of the modules beside it that its module takes functions from."""
    module = sys.modules[function.__module__]
    package = module.__name__.rpartition(".")[0]
    names = {module.__name__} | {
        value.__module__
        for value in vars(module).values()
        if callable(value) and package and getattr(value, "__module__", "").startswith(f"{package}.")
    }
    # The registry holds no cleaner's code: a line of documentation there is no reason to clean terabytes again.
    names.discard(Dataset.__module__)
    digest = hashlib.sha256()
    for name in sorted(names):
        file = sys.modules[name].__file__
        assert file is not None
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()
