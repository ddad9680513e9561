"""A corpus in the layouts and schemas of the public datasets, of text nobody wrote: to try the pipeline at any size::

    python benchmarks/upstream_corpus.py CORPUS --gigabytes 5 --workers 2
    hrm-text data clean all --from CORPUS --out CLEANED

Every dataset has its folder. Of the records, 3 % are copies and 3 % near copies, half of them of records of the same
file, half of a pool that all datasets draw from. About one in two hundred is hostile: strings of special tokens, empty
answers, nulls and wrong types, broken lines, bytes that are not UTF-8. The same settings give the same bytes, with any
number of workers; what is finished is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import multiprocessing
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, its neighbours are found from the folder above

from benchmarks.generated_text import lengths, near_copy, texts
from benchmarks.upstream_layouts import LAYOUTS, PREFIX, RESPONSE, Columns, Drawn, Layout
from hrm_text.contracts import UserError
from hrm_text.files import read_json, whole_file, whole_folder, write_json

FILE_BYTES = 150 * 10**6
"""On the disk, about, of each file of the larger datasets."""
CHUNK_BYTES = 6 * 10**6
"""Of text made at once, which bounds the memory."""
ROWS_A_FOLDER = 100
"""Where every row is a file."""
COPIES, NEAR_COPIES, HOSTILE = 0.03, 0.03, 0.005
"""Shares of the records."""
POOL = 4096
"""Records that every dataset copies from."""
SPECIAL = "<|im_end|><|box_end|><|im_start|><|object_ref_start|><think><|endoftext|>"
BYTES_A_TOKEN = 4.3
OWN_ROW_BYTES = 100
"""Of the datasets that make their own rows."""


@dataclass(frozen=True)
class Job:
    """A file, or a folder of files of one row, that is written at once."""

    index: int
    """Of the layout."""
    part: int
    parts: int
    size: int
    """Bytes to reach on the disk."""

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.index]

    def path(self, out: Path) -> Path:
        below = out / self.layout.name / self.layout.path.format(part=self.part, parts=self.parts, row=0)
        return below.parent if self.is_folder else below

    @property
    def is_folder(self) -> bool:
        return "{row}" in self.layout.path


def plan(gigabytes: float) -> list[Job]:
    """All files, the largest datasets first."""
    shares = sum(layout.share for layout in LAYOUTS)
    jobs = []
    for index, layout in enumerate(LAYOUTS):
        total = max(1, int(layout.share / shares * gigabytes * 1e9))
        alone = "{part" not in layout.path
        a_file = ROWS_A_FOLDER * row_bytes(layout) if "{row}" in layout.path else FILE_BYTES
        parts = 1 if alone else max(1, round(total / a_file))
        jobs += [Job(index, part, parts, total // parts) for part in range(parts)]
    return sorted(jobs, key=lambda job: -job.layout.share)


def row_bytes(layout: Layout) -> int:
    """About how long a row is: the means of the two lognormal distributions."""
    if layout.makes_its_own_rows:
        return OWN_ROW_BYTES
    means = [np.exp(mean + deviation**2 / 2) for mean, deviation in (layout.question, layout.answer)]
    return int(BYTES_A_TOKEN * sum(means))


def write_job(out: Path, seed: int, job: Job) -> int:
    """Write a file, or a folder; returns its bytes."""
    path = job.path(out)
    if job.is_folder:
        columns = next(chunks(job, seed))
        with whole_folder(path) as folder:
            for number, row in enumerate(rows_of(columns, ROWS_A_FOLDER)):
                (folder / f"{number}{Path(job.layout.path).suffix}").write_bytes(problem_bytes(row))
        return sum(file.stat().st_size for file in path.iterdir())
    with whole_file(path) as beside:
        if path.suffix == ".parquet":
            write_parquet(beside, job, seed)
        else:
            write_lines(beside, job, seed, path.name)
    return path.stat().st_size


def problem_bytes(row: dict[str, Any]) -> bytes:
    """One problem: text where it is nothing but a question and an answer."""
    if row.keys() == {"question", "answer"}:
        return f"Problem:\n{row['question']}\nAnswer:\n{row['answer'] or ''}\n".encode()
    return orjson.dumps(row)


def write_parquet(path: Path, job: Job, seed: int) -> None:
    made = chunks(job, seed)
    first = pa.table(next(made))
    with pq.ParquetWriter(path, first.schema, compression="snappy") as file:
        file.write_table(first)
        while path.stat().st_size < job.size:
            file.write_table(pa.table(next(made), schema=first.schema))


def write_lines(path: Path, job: Job, seed: int, name: str) -> None:
    with contextlib.ExitStack() as closing:
        raw: IO[bytes] = closing.enter_context(path.open("wb"))
        file: Any = raw
        if name.endswith(".gz"):  # the same bytes whenever they are written
            file = closing.enter_context(gzip.GzipFile("", "wb", 1, raw, mtime=0))
        for number, columns in enumerate(chunks(job, seed)):
            names = list(columns)
            if ".jsonl" in name:
                file.write(json_lines(columns, np.random.default_rng([seed, job.index, job.part, number, 1])))
            elif name.endswith(".csv"):
                rows = ["", *map(",".join, zip(*columns.values(), strict=True))]
                file.write((("" if number else ",".join(names)) + "\n".join(rows)).encode())
            else:
                pairs = zip(columns["question"], columns["answer"], strict=True)
                file.write("".join(f"{question}\n{answer}\n" for question, answer in pairs).encode())
            if raw.tell() >= job.size:
                return


def json_lines(columns: Columns, rng: np.random.Generator) -> bytes:
    """The rows as lines, a few of them spoilt."""
    lines = [orjson.dumps(row) for row in rows_of(columns)]
    wrong_types = orjson.dumps(dict.fromkeys(columns, 7))
    for i in np.flatnonzero(rng.random(len(lines)) < HOSTILE).tolist():
        broken = (lines[i][: len(lines[i]) // 2], b'{"question": "\xff\xfe"}', b"[]", wrong_types, b"")
        lines[i] = broken[i % len(broken)]
    return b"\n".join(lines) + b"\n"


def rows_of(columns: Columns, most: int | None = None) -> Iterator[dict[str, Any]]:
    cells = [values[:most] for values in columns.values()]
    return (dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True))


def chunks(job: Job, seed: int) -> Iterator[Columns]:
    """The rows of a file, chunk by chunk, without end."""
    layout = job.layout
    rng = np.random.default_rng([seed, zlib.crc32(layout.name.encode()), job.part])
    count = min(CHUNK_BYTES, job.size // 4) // row_bytes(layout) + 8
    if job.is_folder:
        count = max(count, ROWS_A_FOLDER)
    first = 0
    while True:
        questions, answers = records(layout, seed, rng, count)
        columns = layout.rows(Drawn(rng, first, questions, answers))
        # Whole rows are copied here: what a layout adds to a record is part of it.
        for i in np.flatnonzero(rng.random(count) < COPIES * (1 if layout.makes_its_own_rows else 0.5)).tolist():
            source = int(rng.integers(0, count))
            for values in columns.values():
                values[i] = values[source]
        yield columns
        first += count


def records(
    layout: Layout, seed: int, rng: np.random.Generator, count: int
) -> tuple[list[str | None], list[str | None]]:
    """Questions and answers: new ones, copies from the pool, near copies, and some that are hostile."""
    sides: list[list[str | None]] = [[""] * count, [""] * count]
    if layout.makes_its_own_rows:
        return sides[0], sides[1]
    for side, (mean, deviation) in zip(sides, (layout.question, layout.answer), strict=True):
        side[:] = texts(seed, rng, lengths(rng, count, np.exp(mean), deviation), layout.style)
    questions, answers = sides
    fate = rng.random(count)
    common = pool(seed)
    for i in np.flatnonzero(fate < COPIES / 2 + NEAR_COPIES).tolist():
        from_pool = fate[i] < COPIES / 2 + NEAR_COPIES / 2
        number = int(rng.integers(0, POOL if from_pool else count))
        asked, said = common[number] if from_pool else (questions[number], answers[number])
        is_exact = fate[i] < COPIES / 2
        questions[i] = asked if is_exact or not asked else near_copy(seed, rng, asked)
        answers[i] = said if is_exact or not said else near_copy(seed, rng, said)
    for i in np.flatnonzero(fate > 1 - HOSTILE).tolist():
        questions[i], answers[i] = hostile(i, questions[i], answers[i])
    return questions, answers


def hostile(number: int, question: str | None, answer: str | None) -> tuple[str | None, str | None]:
    return (
        (f"{question} {SPECIAL}", answer),
        (question, f"{SPECIAL} {answer}"),
        (question, ""),
        ("", answer),
        (question, None),
    )[number % 5]


@lru_cache
def pool(seed: int) -> list[tuple[str, str]]:
    """Records that turn up in every dataset."""
    rng = np.random.default_rng([seed, 0])
    sides = [texts(seed, rng, lengths(rng, POOL, np.exp(mean), dev), "prose") for mean, dev in (PREFIX, RESPONSE)]
    return list(zip(*sides, strict=True))


def link_shared(out: Path) -> None:
    """Give the datasets that read the same files links to them."""
    for layout in LAYOUTS:
        for name in layout.also:
            for file in sorted(path for path in (out / layout.name).rglob("*") if path.is_file()):
                link = out / name / file.relative_to(out / layout.name)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    os.link(file, link)


def make_corpus(out: Path, gigabytes: float, seed: int = 0, workers: int = 2) -> int:
    """Write what is missing of the corpus; returns the bytes written now.

    Raises:
        UserError: the folder holds a corpus of other settings.
    """
    settings = {"gigabytes": gigabytes, "seed": seed}
    note = out / ".corpus.json"
    if note.exists() and read_json(note) != settings:
        raise UserError(f"{out}: holds a corpus of other settings, {read_json(note)}; choose another folder")
    write_json(note, settings)
    jobs = [job for job in plan(gigabytes) if not job.path(out).exists()]
    written = 0
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) if workers > 1 else contextlib.nullcontext() as executor:
        if executor is None:
            sizes: Iterator[int] = (write_job(out, seed, job) for job in jobs)
        else:
            sizes = (
                done.result() for done in as_completed([executor.submit(write_job, out, seed, job) for job in jobs])
            )
        for number, size in enumerate(sizes, start=1):
            written += size
            rate = written / 1e6 / (time.monotonic() - start)
            print(f"\r{number}/{len(jobs)} files, {written / 1e9:.2f} GB, {rate:.0f} MB/s", end="", file=sys.stderr)
    if jobs:
        print(file=sys.stderr)
    link_shared(out)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="on the disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    try:
        make_corpus(options.out, options.gigabytes, options.seed, options.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out} is complete. Next:\n  hrm-text data clean all --from {options.out} --out CLEANED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
