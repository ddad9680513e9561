"""Strata gathered from shared files: examples of thousands of tasks, mixed in every upstream file, one file per task.

    spill    an upstream file -> a part: its examples by task, in runs that fit in memory
    gather   all parts -> a file of records per task, in the order of the upstream files

Tasks fall into ``BUCKETS`` by a hash of their names. A part holds every run bucket by bucket, so gathering a bucket
reads its own share of each part and no more; all buckets together read every part once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hrm_text.contracts import Example
from hrm_text.data.cleaner import Cleaned
from hrm_text.data.records import FIELDS
from hrm_text.files import whole_file

BUCKETS = 64

RUN_CHARACTERS = 64 << 20
RUN_ROWS = 1 << 18
"""A run is what a spilling worker holds: at most 0.5 GB with what Python adds to each string."""

PENDING_BYTES = 8 << 20
"""A task's examples are written out once there are so many: with ``OPEN_FILES``, 512 MiB of a gathering worker."""
OPEN_FILES = 64

RECORD_SCHEMA = pa.schema([(name, pa.string()) for name in FIELDS])
_PART_SCHEMA = pa.schema([("file", pa.string()), *RECORD_SCHEMA])


def stratum_file(stratum: str) -> str:
    """A file name for a task: as it is where it is plain, else with what is unsafe replaced and a hash added."""
    safe = re.sub(r"[^\w.+=-]|^\.", "_", stratum.replace("/", "__"), flags=re.ASCII)[:120]
    if safe == stratum and safe:
        return f"{safe}.parquet"
    # The hash keeps tasks apart that look the same now.
    return f"{safe or 'unnamed'}-{hashlib.sha256(stratum.encode('utf-8', 'replace')).hexdigest()[:12]}.parquet"


def bucket_of(file: str) -> int:
    """The bucket of a task's file."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") % BUCKETS


@dataclass(frozen=True, slots=True)
class PartIndex:
    """What lies in a part."""

    buckets: list[int]
    """The bucket of every batch, in the order of the file."""
    files: list[str]
    """Every task's file, sorted."""


def spill(path: Path, examples: Iterable[Cleaned]) -> PartIndex:
    """Write a part, whole or not at all."""
    buckets: list[int] = []
    files: dict[str, str] = {}
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with whole_file(path) as beside, pa.ipc.new_file(str(beside), _PART_SCHEMA, options=options) as part:
        for run in _runs(examples, files):
            # Sorted by bucket, then by task; within a task in the order of the rows.
            for bucket, batch in _batches(run):
                part.write_batch(batch)
                buckets.append(bucket)
    return PartIndex(buckets, sorted(set(files.values())))


def _runs(examples: Iterable[Cleaned], files: dict[str, str]) -> Iterator[dict[str, list[Example]]]:
    """Examples by their task's file, as many at a time as memory is meant to hold; ``files`` learns the names."""
    run: dict[str, list[Example]] = {}
    rows = characters = 0
    for stratum, example in examples:
        if stratum not in files:
            files[stratum] = stratum_file(stratum)
        run.setdefault(files[stratum], []).append(example)
        rows += 1
        characters += len(example.instruction) + len(example.response)
        if rows == RUN_ROWS or characters >= RUN_CHARACTERS:
            yield run
            run, rows, characters = {}, 0, 0
    if run:
        yield run


def _batches(run: dict[str, list[Example]]) -> Iterator[tuple[int, pa.RecordBatch]]:
    by_bucket: dict[int, list[str]] = {}
    for file in sorted(run):
        by_bucket.setdefault(bucket_of(file), []).append(file)
    for bucket in sorted(by_bucket):
        rows = [(file, example) for file in by_bucket[bucket] for example in run[file]]
        columns = [[file for file, _ in rows]] + [[getattr(example, name) for _, example in rows] for name in FIELDS]
        yield bucket, pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=_PART_SCHEMA)


@dataclass(slots=True)
class _Pending:
    """Examples of a task that wait to be written."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    bytes: int = 0
    writer: pq.ParquetWriter | None = None


def gather(out: Path, files: Sequence[str], parts: Sequence[tuple[Path, Sequence[int]]]) -> None:
    """Write the files of some tasks of one bucket, each whole or not at all.

    Args:
        out: the folder for them.
        files: their names, at most ``OPEN_FILES``, all of one bucket.
        parts: in the order in which the examples are to stand; with each the bucket of its batches.
    """
    bucket = bucket_of(files[0])
    waiting = {file: _Pending() for file in files}
    with ExitStack() as stack:
        beside = {file: stack.enter_context(whole_file(out / file)) for file in files}
        writers = stack.enter_context(ExitStack())  # they are closed before any file gets its name

        def write(file: str) -> None:
            pending = waiting[file]
            if pending.writer is None:
                pending.writer = writers.enter_context(record_writer(beside[file]))
            pending.writer.write_table(pa.Table.from_batches(pending.batches, RECORD_SCHEMA))
            pending.batches, pending.bytes = [], 0

        for path, buckets in parts:
            numbers = [number for number, of in enumerate(buckets) if of == bucket]
            if not numbers:
                continue
            with pa.memory_map(str(path)) as memory, pa.ipc.open_file(memory) as part:
                for number in numbers:
                    for file, batch in _tasks(part.get_batch(number)):
                        if file not in waiting:
                            continue
                        pending = waiting[file]
                        pending.batches.append(batch)
                        pending.bytes += batch.nbytes
                        if pending.bytes >= PENDING_BYTES:
                            write(file)
        for file in files:
            if waiting[file].batches:
                write(file)


def record_writer(path: Path) -> pq.ParquetWriter:
    """A Parquet file of records, as the published ones are."""
    # Of the texts hardly two are alike, so only the conditions are worth a dictionary.
    return pq.ParquetWriter(path, RECORD_SCHEMA, compression="zstd", use_dictionary=["condition"])


def _tasks(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The stretches of a batch that are of one task, copied: a slice would keep the whole batch in memory."""
    encoded = pc.run_end_encode(batch.column("file"))
    start = 0
    for file, end in zip(encoded.values.to_pylist(), encoded.run_ends.to_pylist(), strict=True):
        yield file, batch.select(list(FIELDS)).take(pa.array(np.arange(start, end)))
        start = end
