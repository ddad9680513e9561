"""What there is to clean: the upstream files of datasets, or their shards on the hub, with what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.data.cleaner import CleanSettings, CleanShard, cleaner_stamp, files_of_folder
from hrm_text.data.sources.upstream import Dataset
from hrm_text.data.sources.upstream_files import split_endings
from hrm_text.data.sources.upstream_hub import HubShard, hub_shards


def find_sources(datasets: Sequence[Dataset], folder: Path | None) -> list[tuple[Dataset, Path | list[HubShard]]]:
    """Every dataset with its local folder, or its shards on the hub.

    Args:
        datasets: what is to be cleaned.
        folder: holds ``<dataset>/`` for each or, for a single one, perhaps its files themselves; None is the hub.

    Raises:
        UserError: files are missing, or a dataset is not on the hub; it tells of all at once.
    """
    if folder is None:
        elsewhere = [f"  {found.name}: {found.home}" for found in datasets if found.hub is None]
        if elsewhere:
            raise UserError(
                "not on the hub in the form that is read here; fetch the files and name their folder with --from:\n"
                + "\n".join(elsewhere)
            )
        return [(found, hub_shards(found.hub)) for found in datasets if found.hub is not None]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    sources: list[tuple[Dataset, Path | list[HubShard]]] = []
    missing = []
    for found in datasets:
        own = folder / found.name
        root = folder if len(datasets) == 1 and not own.is_dir() else own
        if next(_matches(root, found.files), None) is None:
            missing.append(f"  {found.name}: no file in {root} matches {' or '.join(found.files)} (from {found.home})")
        sources.append((found, root))
    if missing:
        raise UserError("\n".join(["found nothing to read:", *missing]))
    return sources


def _matches(root: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """The files of a dataset, hidden ones left out; one may come twice."""
    for pattern in patterns:
        for path in root.glob(pattern):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
                yield path


def make_shards(found: Dataset, out: Path, source: Path | list[HubShard], settings: CleanSettings) -> list[CleanShard]:
    """The shards of a dataset, in the order of their names.

    Args:
        found: the dataset.
        out: its folder of records.
        source: its local folder, or its shards on the hub.
        settings: of the cleaning.

    Raises:
        UserError: two files would give one file of records, or a file has just vanished.
    """
    cleaner = cleaner_stamp(found, settings)
    if isinstance(source, list):
        return [
            CleanShard(
                found.name, shard.name, None, shard, out, {**cleaner, "revision": shard.revision}, settings, bytes=1
            )
            for shard in source
        ]
    matches = _matches(source, found.files)
    paths = sorted({path.parent for path in matches} if found.one_row_per_file else set(matches))
    shards: dict[str, CleanShard] = {}
    for path in paths:
        below = path.relative_to(source)
        if found.one_row_per_file:
            # Of millions of small files only those of one folder are listed at a time.
            files = files_of_folder(path, found.files)
            name = below.as_posix() if below.parts else found.name
        else:
            files = [path]
            name = below.with_name(split_endings(path)[0]).as_posix()
        if name in shards:
            raise UserError(
                f"{shards[name].source} and {path} would both become {name}.parquet; take one of them out of {source}"
            )
        identity, size = _identity(files)
        shards[name] = CleanShard(found.name, name, source, path, out, {**cleaner, **identity}, settings, size)
    return [shards[name] for name in sorted(shards)]


def _identity(files: Sequence[Path]) -> tuple[dict[str, Any], int]:
    """What tells whether files are still the ones that were read, and their bytes."""
    try:
        stats = [(path.name, path.stat()) for path in files]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; was it moved or deleted just now?") from None
    size = sum(stat.st_size for _, stat in stats)
    if len(stats) == 1:
        return {"bytes": size, "mtime_ns": stats[0][1].st_mtime_ns}, size
    listing = digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return {"files": len(stats), "bytes": size, "listing": listing}, size


def digest(value: object) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
