"""Shards of a token store: runs of rows, much of a size, whatever the sizes of the source files.

A shard is what one worker goes through at a time, so its bounds are what bounds a worker's memory. They depend on the
store alone: any number of workers makes the same shards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.engine import Engine, Progress
from hrm_text.data.masks import folder_identity
from hrm_text.data.pack import EpochIndex
from hrm_text.data.storage import read_integers
from hrm_text.data.tokenize import MANIFEST, SPANS, refuse_unfinished, store_folders
from hrm_text.files import read_json, write_json

Task = TypeVar("Task")

SHARD_ROWS = 1 << 20
SHARD_TOKENS = 1 << 28


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one folder that stand next to each other."""

    folder: Path
    source: int
    """Number of the folder in the store."""
    first: int
    """Its first row."""
    last: int
    """The row after its last."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Some runs; rows are numbered through the whole store, folder after folder."""

    number: int
    first_row: int
    runs: tuple[Run, ...]
    tokens: int
    """About how many; the weight of the shard."""


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """What is to be known of a store before its shards are worked on."""

    store: Path
    folders: tuple[Path, ...]
    identities: tuple[Mapping[str, Any], ...]
    """Of each folder, as in a mask."""
    shards: tuple[Shard, ...]

    @property
    def identity_of(self) -> dict[str, Mapping[str, Any]]:
        """By the name of the folder."""
        return {folder.name: known for folder, known in zip(self.folders, self.identities, strict=True)}

    @property
    def first_rows(self) -> npt.NDArray[np.int64]:
        """[folders + 1]; the number, in the whole store, of the first row of each folder, then of all rows."""
        return np.cumsum([0] + [identity["rows"] for identity in self.identities], dtype=np.int64)

    @property
    def rows(self) -> int:
        return sum(identity["rows"] for identity in self.identities)

    @property
    def tokens(self) -> int:
        return sum(identity["tokens"] for identity in self.identities)


def index_store(store: Path, shard_rows: int = SHARD_ROWS, shard_tokens: int = SHARD_TOKENS) -> StoreIndex:
    """Identify every folder of a store and cut it into shards.

    Raises:
        UserError: no finished store, an empty or a damaged one, or folders of different tokenizers.
    """
    refuse_unfinished(store)
    info = read_json(store / MANIFEST)
    if not isinstance(info, dict):
        raise UserError(f"{store / MANIFEST}: expected an object; tokenise the store's sources again")
    folders = store_folders(store)
    identities = tuple(folder_identity(folder) for folder in folders)
    tokenizers = {identity["tokenizer_sha256"] for identity in identities} - {None}
    if len(tokenizers) > 1:
        raise UserError(f"{store}: made with {len(tokenizers)} different tokenizers; tokenise all with the same one")
    if not sum(identity["rows"] for identity in identities):
        raise UserError(f"{store}: the store holds no record")

    shards: list[Shard] = []
    runs: list[Run] = []
    rows = tokens = first_row = 0

    def close() -> None:
        nonlocal rows, tokens, first_row
        if runs:
            shards.append(Shard(len(shards), first_row, tuple(runs), tokens))
            first_row += rows
            rows = tokens = 0
            runs.clear()

    for source, (folder, identity) in enumerate(zip(folders, identities, strict=True)):
        # A folder is cut by its mean length: reading every length here would take as long as reading the index.
        per_row = max(1, -(-identity["tokens"] // max(1, identity["rows"])))
        first = 0
        while first < identity["rows"]:
            room = min(shard_rows - rows, (shard_tokens - tokens) // per_row)
            if room < 1 and runs:
                close()
                continue
            last = min(identity["rows"], first + max(1, room))
            runs.append(Run(folder, source, first, last))
            rows += last - first
            tokens += (last - first) * per_row
            first = last
    close()
    return StoreIndex(store, tuple(folders), identities, tuple(shards))


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run, checked: every span lies inside of the tokens."""

    tokens: npt.NDArray[np.integer]
    """All tokens of the folder, mapped."""
    spans: EpochIndex
    """Of the run's rows."""


def read_rows(run: Run) -> Rows:
    """Open the rows of a run.

    Raises:
        UserError: the folder is gone or damaged, or an index points outside of its tokens.
    """
    columns = [np.asarray(read_integers(run.folder / f"{name}.npy")[run.first : run.last], np.int64) for name in SPANS]
    tokens = read_integers(run.folder / "tokens.npy")
    if any(len(column) != run.last - run.first for column in columns):
        raise UserError(f"{run.folder}: its index files differ in length or have changed; tokenise its source again")
    spans = EpochIndex(*columns)
    for start, length in ((spans.inst_start, spans.inst_len), (spans.resp_start, spans.resp_len)):
        if len(spans) and (start.min() < 0 or length.min() < 0 or (start + length).max() > len(tokens)):
            raise UserError(f"{run.folder}: an index points outside of tokens.npy; tokenise its source again")
    return Rows(tokens, spans)


def open_work_folder(out: Path, plan: Mapping[str, Any], index: StoreIndex) -> Path:
    """The folder beside ``out`` for what is half done: as an earlier run left it, if that had the same plan and store.

    Args:
        out: what is being made.
        plan: what its content depends on besides the store, as JSON values.
        index: of the store.
    """
    work = out.with_name(f"{out.name}.work")
    shards = [[shard.first_row, *([run.folder.name, run.last] for run in shard.runs)] for shard in index.shards]
    wanted = {"plan": dict(plan), "folders": index.identity_of, "shards": shards}
    noted = work / "plan.json"
    if noted.is_file() and read_json(noted) == wanted:
        return work
    if work.exists() and not noted.is_file():
        raise UserError(f"{work}: is in the way, its name is needed for work in progress; remove or rename it")
    shutil.rmtree(work, ignore_errors=True)
    write_json(noted, wanted)
    return work


def run_stage(
    engine: Engine,
    work: Path,
    name: str,
    do: Callable[[Task], None],
    tasks: Sequence[Task],
    result: Callable[[Task], Path],
    weight: Callable[[Task], int],
    on_progress: Progress | None,
) -> None:
    """Do the tasks of a stage whose results do not lie on the disk yet.

    Args:
        engine: its folder for logs is inside ``work`` unless it has one.
        work: as ``open_work_folder`` gave it.
        name: of the stage.
        do: leaves the result of one task, whole or not at all.
        tasks: all.
        result: the file or folder that a task leaves.
        weight: of a task.
        on_progress: weight done, of those left to do and those found, and in all.
    """
    left = [task for task in tasks if not result(task).exists()]
    total = sum(weight(task) for task in tasks)
    found = total - sum(weight(task) for task in left)

    def advance(done: int, _: int) -> None:
        if on_progress is not None:
            on_progress(found + done, total)

    if engine.folder is None:
        engine = replace(engine, folder=work / "engine")
    engine.run(name, do, left, weights=[weight(task) for task in left], on_progress=advance)
