"""What was left out on the way to training: the rows that masks name and those that cleaning dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.files import read_json


@dataclass(frozen=True, slots=True)
class MaskStats:
    """One folder of masks."""

    name: str
    kind: str
    settings: Mapping[str, Any]
    rows: int
    masked: int
    by_source: Mapping[str, tuple[int, int]]
    """Rows and masked rows of every folder that has a masked one."""


@dataclass(slots=True)
class CleaningStats:
    """What became of the rows of a public dataset."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def read_mask_stats(folder: Path) -> MaskStats:
    """What a folder of masks leaves out, by the counts of its ``mask.json``.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    manifest = read_json(folder / "mask.json")
    noted = manifest.get("folders") if isinstance(manifest, dict) else None
    if not isinstance(noted, dict):
        raise UserError(f"{folder / 'mask.json'}: expected an object with the counts of folders; make the masks again")
    by_source, rows = {}, 0
    for name, counts in noted.items():
        identity = counts.get("identity") if isinstance(counts, dict) else None
        of_source = identity.get("rows", 0) if isinstance(identity, dict) else 0
        masked = counts.get("masked", 0) if isinstance(counts, dict) else 0
        if not isinstance(of_source, int) or not isinstance(masked, int):
            raise UserError(f"{folder / 'mask.json'}: expected numbers of {name}; make the masks again")
        rows += of_source
        if masked:
            by_source[name] = (of_source, masked)
    masked = sum(count for _, count in by_source.values())
    settings = manifest.get("settings")
    return MaskStats(
        name=folder.name,
        kind=str(manifest.get("kind", "unknown")),
        settings=settings if isinstance(settings, dict) else {},
        rows=rows,
        masked=masked,
        by_source=by_source,
    )


def read_cleaning(records: Path) -> tuple[dict[str, CleaningStats], int]:
    """Add up the reports of `hrm-text data clean` by dataset; and how many files are no reports, which are passed over.

    Raises:
        UserError: there is no such folder.
    """
    if not records.is_dir():
        raise UserError(f"{records}: no such folder of records")
    found: dict[str, CleaningStats] = {}
    unreadable = 0
    for path in sorted(records.rglob("*.json")):
        parts = path.relative_to(records).parts
        if ".reports" not in parts[:-1]:
            continue
        name = parts[0] if parts[0] != ".reports" else records.resolve().name
        try:
            report = read_json(path)
        except (UserError, OSError):
            report = None
        if not isinstance(report, dict) or not all(isinstance(report.get(key), int) for key in ("read", "kept")):
            unreadable += 1
            continue
        cleaning = found.setdefault(name, CleaningStats())
        cleaning.read += report["read"]
        cleaning.kept += report["kept"]
        cleaning.dropped.update(positive_counts(report.get("dropped")))
    return found, unreadable


def positive_counts(value: Any) -> dict[str, int]:
    """The counts by name that a JSON value holds, if it does."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(name): count for name, count in items if isinstance(count, int) and count > 0}
