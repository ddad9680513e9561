"""A sample of the text of any corpus, in bounded memory: what a tokenizer is trained on and judged by.

Every file is a stratum. All have the same share of the budget; what a small file leaves over goes to the larger ones.
One record is in memory at a time, 16 MiB at most, and of a Parquet file a thousand rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hrm_text.contracts import Example, UserError
from hrm_text.data.engine import Progress
from hrm_text.data.records import (
    FIELDS,
    MAX_RECORD_BYTES,
    BadRecord,
    RecordFile,
    Unusable,
    decoded_cell,
    example_of,
    locate_records,
    parse_json,
    schema_problem,
    text_cells,
)

OnBad = Callable[[BadRecord], None]

SAMPLE_BYTES = 2 << 30
_BLOCK_BYTES = 1 << 16
"""Records are read in runs of about so many bytes of text: a seek costs more than reading a few neighbours."""
_SKIP_BYTES = 1 << 20
_BATCH_ROWS = 1024
_GROUP_SHARE = 8
"""Row groups are chosen so that one in so many of their rows is needed."""


def sample_texts(
    files: Sequence[RecordFile],
    budget: int,
    seed: int,
    on_bad: OnBad,
    *,
    on_progress: Progress | None = None,
) -> Iterator[str]:
    """Instructions and responses from all over some files, up to ``budget`` bytes in all.

    A file that fits its share is read whole. Of a larger JSONL file, runs of lines are read, one at a random place of
    each of as many equal stretches; of a larger Parquet file, random rows of row groups spread evenly. The same files,
    budget and seed give the same texts in the same order. A text that is longer than what is left of its share is cut.

    Args:
        files: as ``find_record_files`` finds them.
        budget: bytes of UTF-8.
        seed: of the choice.
        on_bad: is told of bad records among those that are read; their line is 0 where it is not known.
        on_progress: bytes yielded, and the budget.

    Raises:
        UserError: a file is missing or damaged.
    """
    if budget < 1:
        raise UserError(f"a sample of {budget} bytes: expected at least 1")
    # Small files first: by the time the large ones are met, it is known what the small ones left over.
    in_order = sorted(((text_bytes(file.path), file.safe_name, file) for file in files), key=lambda entry: entry[:2])
    left = budget
    for number, (size, name, file) in enumerate(in_order):
        share = left // (len(in_order) - number)
        if share == 0:
            continue
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        rng = np.random.Generator(np.random.Philox(seed=int.from_bytes(digest[:16])))
        if size <= share:
            examples = (located.example for located in locate_records(file.path, on_bad))
            texts = _within(examples, share)
        else:
            texts = (_of_jsonl if file.path.suffix == ".jsonl" else _of_parquet)(file.path, share, rng, on_bad)
        for text in texts:
            left -= _bytes(text)
            yield text
        if on_progress is not None:
            on_progress(budget - left, budget)


def text_bytes(path: Path) -> int:
    """About how many bytes of text a record file holds, without reading it.

    Raises:
        UserError: the file is missing or no Parquet.
    """
    try:
        if path.suffix != ".parquet":
            return path.stat().st_size
        with pq.ParquetFile(path) as file:
            return sum(_group_bytes(file, group) for group in range(file.metadata.num_row_groups))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not readable as Parquet ({error}); fetch or write it again, or take it out of the input"
        ) from None


def _group_bytes(file: pq.ParquetFile, group: int) -> int:
    """Of the columns with text, as they are written before compression."""
    about = file.metadata.row_group(group)
    columns = (about.column(i) for i in range(about.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in FIELDS)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _within(examples: Iterator[Example], quota: int) -> Iterator[str]:
    """Texts until they add up to ``quota`` bytes; the last one is cut there."""
    for example in examples:
        for text in (example.instruction, example.response):
            size = _bytes(text)
            if size > quota:
                text = text.encode("utf-8", "surrogatepass")[:quota].decode("utf-8", "ignore")
                size = quota
            quota -= size
            if text:
                yield text
            if quota <= 0:
                return


def _of_jsonl(path: Path, share: int, rng: np.random.Generator, on_bad: OnBad) -> Iterator[str]:
    """A run of lines at a random place of each of some equal stretches of a file."""
    size = path.stat().st_size
    stretches = max(1, share // _BLOCK_BYTES)
    left = share
    with path.open("rb") as file:
        for number in range(stretches):
            start, end = size * number // stretches, size * (number + 1) // stretches
            quota = left // (stretches - number)
            # Early enough for the run to end within its stretch. Where no line begins after it, one may before it.
            for offset in (int(rng.integers(start, max(end - quota, start) + 1)), start):
                before = left
                for text in _within(_lines(path, file, offset, end, on_bad), quota):
                    left -= _bytes(text)
                    yield text
                if left < before:
                    break


def _lines(path: Path, file: BinaryIO, offset: int, end: int, on_bad: OnBad) -> Iterator[Example]:
    """The records of the lines that start at ``offset`` or after it, and before ``end``."""
    if offset:
        file.seek(offset - 1)
        # The rest of the line at hand may be a gigabyte.
        while (skipped := file.readline(_SKIP_BYTES)) and not skipped.endswith(b"\n"):
            if file.tell() >= end:
                return
    else:
        file.seek(0)
    while (start := file.tell()) < end and (line := file.readline(MAX_RECORD_BYTES + 1)):
        size, piece = len(line), line
        while not piece.endswith(b"\n") and (piece := file.readline(_SKIP_BYTES)):
            size += len(piece)
        if not start:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if line.isspace() or not line:
            continue
        try:
            if size > MAX_RECORD_BYTES:
                raise Unusable("too_large", f"it has {size:,} bytes, expected at most {MAX_RECORD_BYTES:,}")
            yield example_of(parse_json(line))
        except Unusable as reason:
            on_bad(BadRecord(str(path), 0, reason.kind, f"the line at byte {start:,}: {reason}"))


def _of_parquet(path: Path, share: int, rng: np.random.Generator, on_bad: OnBad) -> Iterator[str]:
    """Random rows of some row groups, spread evenly over a file."""
    try:
        with pq.ParquetFile(path) as file:
            problem = schema_problem(file.schema_arrow)
            if problem is not None:
                kind, message = problem
                on_bad(BadRecord(str(path), 0, kind, f"{message}; the whole file is skipped"))
                return
            groups = file.metadata.num_row_groups
            sizes = [_group_bytes(file, group) for group in range(groups)]
            wanted = min(groups, max(1, -(-_GROUP_SHARE * share * groups // max(sum(sizes), 1))))
            phase = rng.random()
            for number in range(wanted):
                group = int((number + phase) * groups / wanted)
                quota = share // wanted
                rate = min(1.0, quota / max(sizes[group], 1))
                yield from _within(_rows(path, file, group, rate, rng, on_bad), quota)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not readable as Parquet ({error}); fetch or write it again, or take it out of the input"
        ) from None


def _rows(
    path: Path, file: pq.ParquetFile, group: int, rate: float, rng: np.random.Generator, on_bad: OnBad
) -> Iterator[Example]:
    """The records of a row group that chance chooses."""
    first = sum(file.metadata.row_group(i).num_rows for i in range(group))
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=list(FIELDS)):
        chosen = np.flatnonzero(rng.random(len(batch)) < rate)
        if len(chosen):
            few = batch.take(pa.array(chosen))
            columns = [text_cells(few.column(name)) for name in FIELDS]
            for row, cells in zip(chosen.tolist(), zip(*columns, strict=True), strict=True):
                try:
                    yield example_of({name: decoded_cell(name, cell) for name, cell in zip(FIELDS, cells, strict=True)})
                except Unusable as reason:
                    on_bad(BadRecord(str(path), first + row + 1, reason.kind, str(reason)))
        first += len(batch)
