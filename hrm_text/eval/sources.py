"""Where a task's rows come from: the Hugging Face hub, or a local folder of the same files."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hrm_text.contracts import UserError
from hrm_text.eval.task import Dataset, Row
from hrm_text.files import sha256

FORMATS = ("parquet", "jsonl", "jsonl.gz", "json", "csv")
"""Of local files; where a split is there in several, the first."""


class Source(Protocol):
    """Rows, and what they were."""

    def __call__(self, dataset: Dataset, /) -> Sequence[Row]:
        """See ``Rows``."""
        ...

    def provenance(self, dataset: Dataset, /) -> dict[str, Any]:
        """What tells the rows that were read from any others: a commit, or checksums. For JSON."""
        ...


class LocalRows:
    """Rows of files below one folder, as they were downloaded: ``DIR/gsm8k/test.jsonl``.

    The files of a split begin with its name (``test-00000-of-00001.parquet``) and lie in the data set's folder, or in
    there in a folder that has the name of the configuration, or is called data.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--data {folder}: no such folder; expected one with a folder for each data set")
        self.folder = folder
        self._read: dict[tuple[Path, ...], list[Row]] = {}

    def __call__(self, dataset: Dataset, /) -> Sequence[Row]:
        """All rows, files by name.

        Raises:
            UserError: no file of the split, or a damaged one.
        """
        files = tuple(self._files(dataset))
        if files not in self._read:
            self._read[files] = [row for file in files for row in read_rows(file)]
        return self._read[files]

    def provenance(self, dataset: Dataset, /) -> dict[str, Any]:
        """The checksum of every file, by its path below the folder."""
        files = self._files(dataset)
        return {"files": {path.relative_to(self.folder).as_posix(): sha256(path) for path in files}}

    def _files(self, dataset: Dataset) -> list[Path]:
        home = self.folder / dataset.folder
        configured = [home / dataset.config, home / "data" / dataset.config] if dataset.config else []
        places = [*configured, home, home / "data"]
        for place in places:
            inside = sorted(place.iterdir()) if place.is_dir() else []
            for ending in FORMATS:
                pattern = rf"{re.escape(dataset.split)}(?![A-Za-z0-9]).*?\.{re.escape(ending)}"
                found = [path for path in inside if re.fullmatch(pattern, f"{path.name}") and path.is_file()]
                if found:
                    return found
        wanted = f"{dataset.split}*.{{{','.join(FORMATS)}}}"
        raise UserError(
            f"{home}: no file of {dataset.hub}'s split {dataset.split!r}; expected {wanted} in "
            f"{' or '.join(str(place) for place in places)}. Fetch it from https://huggingface.co/datasets/{dataset.hub}"
        )


class HubRows:
    """Rows of the Hugging Face hub, through the ``datasets`` library and its cache."""

    def __init__(self) -> None:
        self._read: dict[Dataset, Any] = {}

    def __call__(self, dataset: Dataset, /) -> Sequence[Row]:
        """All rows of the split.

        Raises:
            UserError: ``datasets`` is not installed, or the hub does not give the data set.
        """
        rows: Sequence[Row] = self._loaded(dataset)
        return rows

    def provenance(self, dataset: Dataset, /) -> dict[str, Any]:
        """Its name, the commit where the library knows it, and the library's fingerprint of the rows."""
        rows = self._loaded(dataset)
        sources = sorted(rows.info.download_checksums or {})
        commits = {found[1] for source in sources if (found := re.search(r"@([0-9a-f]{40})/", source))}
        return {
            "hub": dataset.hub,
            "config": dataset.config,
            "split": dataset.split,
            "revision": next(iter(commits)) if len(commits) == 1 else dataset.revision,
            "rows": len(rows),
        }

    def _loaded(self, dataset: Dataset) -> Any:
        if dataset not in self._read:
            try:
                import datasets
            except ImportError:
                raise UserError(
                    "reading benchmarks from the hub needs something that is not installed: "
                    "pip install 'hrm-text[eval]'. Or fetch the files yourself and name their folder with --data"
                ) from None
            try:
                self._read[dataset] = datasets.load_dataset(
                    dataset.hub, dataset.config, split=dataset.split, revision=dataset.revision
                )
            except Exception as error:  # of the network, the hub or a file: the library has no class for them all
                raise UserError(
                    f"the data set {dataset.hub} cannot be read from the hub: {str(error).strip()}\n"
                    "Run the same command again, or fetch the files and name their folder with --data"
                ) from error
        return self._read[dataset]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file: Parquet, JSON lines (also gzip), a JSON list of objects, or CSV with a header.

    Raises:
        UserError: the file is damaged, or holds something else than objects; the line is named where there is one.
    """
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet as pq

            rows: list[Row] = pq.read_table(path).to_pylist()
            return rows
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from error
    if path.name.endswith(".csv"):
        return list(csv.DictReader(text.splitlines(keepends=True)))
    if path.name.endswith(".json"):
        found = _parsed(path, None, text)
        if not isinstance(found, list):
            raise UserError(f"{path}: expected a JSON list of objects, found {type(found).__name__}")
    else:
        lines = enumerate(text.split("\n"), start=1)  # a line of JSON may hold other marks that splitlines ends at
        found = [_parsed(path, number, line) for number, line in lines if line.strip()]
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number}: expected an object, found {type(row).__name__}")
    return found


def _parsed(path: Path, line: int | None, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line}" if line else str(path)
        raise UserError(f"{place}: not valid JSON ({error}); fetch the file again") from None
