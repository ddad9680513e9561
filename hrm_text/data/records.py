"""Records on disk: JSON lines or Parquet, with the fields condition, instruction and response.

Every record is either yielded or reported, with its file, its line and what is wrong with it: none is lost silently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from hrm_text.contracts import Example, UserError
from hrm_text.data.prompt import parse_condition, strip_thinking
from hrm_text.files import whole_file

FIELDS = tuple(field.name for field in fields(Example))
ENDINGS = (".jsonl", ".parquet")
BAD_KINDS = (
    "not_json",
    "missing_key",
    "unknown_tag",
    "wrong_type",
    "invalid_utf8",
    "empty_response",
    "too_long",
    "too_large",
)
_BATCH_ROWS = 1024

MAX_RECORD_BYTES = 16 << 20
"""Bytes of a line, or of the text of a record: a thousand times any context, and what a tokeniser can still hold. A
larger record is a bad one, whatever its prefix would fit, and a larger line is never held in memory."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used."""

    file: str
    line: int
    """The line of a JSONL file or the row of a Parquet file, from 1; 0 is the file as a whole."""
    kind: str
    """One of BAD_KINDS."""
    message: str

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> BadRecord:
        """What ``dataclasses.astuple`` made of one, back from JSON."""
        return cls(*values)

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.message} [{self.kind}]"


class BadRecords:
    """Collects bad records: how many of each kind, and the first few as examples. Call it with a ``BadRecord``."""

    def __init__(self, *, strict: bool = False, keep: int = 10) -> None:
        """Start empty.

        Args:
            strict: stop at the first bad record.
            keep: how many examples to remember.
        """
        self.strict = strict
        self.keep = keep
        self.counts: Counter[str] = Counter()
        self.examples: list[BadRecord] = []

    def __call__(self, bad: BadRecord) -> None:
        """Take note of a bad record.

        Raises:
            UserError: always, when strict.
        """
        if self.strict:
            raise UserError(
                f"{bad}\nMend or remove it, or leave --strict out to skip bad records and have them counted."
            )
        self.counts[bad.kind] += 1
        if len(self.examples) < self.keep:
            self.examples.append(bad)

    def add_counts(self, counts: Mapping[str, int], examples: Iterable[BadRecord] = ()) -> None:
        """Add bad records that another run or process has found and counted by kind, and the first of them."""
        self.counts.update(counts)
        self.examples += islice(examples, self.keep - len(self.examples))

    @property
    def total(self) -> int:
        return self.counts.total()

    def summary(self) -> str:
        """A line with the count of each kind, then a line for each example; "no bad records" when there was none."""
        if not self.total:
            return "no bad records"
        kinds = ", ".join(f"{self.counts[kind]:,} {kind}" for kind in BAD_KINDS if self.counts[kind])
        lines = [f"{self.total:,} bad {'record' if self.total == 1 else 'records'} skipped: {kinds}"]
        lines += [f"  {bad}" for bad in self.examples]
        unseen = self.total - len(self.examples)
        if self.examples and unseen:
            lines.append(f"  and {unseen:,} more")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class RecordFile:
    """A file of records, and the name it goes by in a token store."""

    path: Path
    safe_name: str
    """The path below the input folder with ``/`` as ``__``, ending kept: ``flan/a.parquet`` is ``flan__a.parquet``."""


def find_record_files(paths: Sequence[Path]) -> list[RecordFile]:
    """The record files among ``paths``, sorted by name: folders are walked, hidden entries and other endings left out.

    Raises:
        UserError: a path does not exist, a file given by itself has another ending, two files share a name, or none
            is found.
    """
    found: dict[str, Path] = {}
    for root in paths:
        if root.is_dir():
            below = [(file, file.relative_to(root)) for ending in ENDINGS for file in root.rglob(f"*{ending}")]
            inside = [(file, name) for file, name in below if file.is_file() and not _hidden(name)]
        elif not root.exists():
            raise UserError(f"{root}: no such file or folder")
        elif root.suffix not in ENDINGS:
            raise UserError(f"{root}: expected records in a file ending in {' or '.join(ENDINGS)}, or a folder of them")
        else:
            inside = [(root, Path(root.name))]
        for file, name in inside:
            safe_name = "__".join(name.parts)
            if safe_name in found:
                raise UserError(
                    f"{found[safe_name]} and {file} would both be called {safe_name!r}; rename one, or give it once"
                )
            found[safe_name] = file
    if not found:
        given = ", ".join(str(path) for path in paths) or "no path was given"
        raise UserError(f"no record file found ({given}); expected files ending in {' or '.join(ENDINGS)}")
    return [RecordFile(found[safe_name], safe_name) for safe_name in sorted(found)]


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def read_records(path: Path, on_bad: Callable[[BadRecord], None]) -> Iterator[Example]:
    """Stream the good records of a .jsonl or .parquet file; each bad one goes to ``on_bad``.

    Thinking is stripped from responses (``prompt.strip_thinking``). Blank lines and other keys or columns are ignored.

    Raises:
        UserError: the file is missing, is not Parquet though its name says so, or has another ending.
    """
    for located in locate_records(path, on_bad):
        yield located.example


def read_texts(files: Iterable[RecordFile], on_bad: Callable[[BadRecord], None]) -> Iterator[str]:
    """The text of some files, instructions and responses one by one: what a tokenizer is trained on."""
    for file in files:
        for example in read_records(file.path, on_bad):
            yield example.instruction
            yield example.response


@dataclass(frozen=True, slots=True)
class LocatedExample:
    """A record and where it was found."""

    line: int
    """Line or row, from 1."""
    bytes_read: int
    """How much of the file has been read, for showing progress; an estimate for Parquet."""
    example: Example


def locate_records(path: Path, on_bad: Callable[[BadRecord], None]) -> Iterator[LocatedExample]:
    """As ``read_records``, with the place of every record."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown ending {path.suffix!r}; expected {' or '.join(ENDINGS)}")
    try:
        yield from readers[path.suffix](path, on_bad)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None


class Unusable(Exception):
    """Why a record cannot be used."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _read_jsonl(path: Path, on_bad: Callable[[BadRecord], None]) -> Iterator[LocatedExample]:
    bytes_read = 0
    # Lines are split as bytes, so that one that is not UTF-8 leaves its neighbours alone.
    with path.open("rb") as file:
        for line, (text, size) in enumerate(_lines(file), start=1):
            bytes_read += size
            if line == 1:
                text = text.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if text.isspace() or not text:
                continue
            try:
                if size > MAX_RECORD_BYTES:
                    raise Unusable("too_large", f"a line of {size:,} bytes, expected at most {MAX_RECORD_BYTES:,}")
                example = example_of(parse_json(text))
            except Unusable as reason:
                on_bad(BadRecord(str(path), line, reason.kind, str(reason)))
            else:
                yield LocatedExample(line, bytes_read, example)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines of a file, each with its size; of one above ``MAX_RECORD_BYTES`` the beginning alone."""
    while text := file.readline(MAX_RECORD_BYTES + 1):
        size, piece = len(text), text
        while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
            size += len(piece)
        yield text, size


def parse_json(line: bytes) -> Mapping[str, Any]:
    """The object on a line."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as undecodable:
            raise Unusable("invalid_utf8", f"not valid UTF-8 at byte {undecodable.start} of the line") from None
        raise Unusable("not_json", f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Unusable("wrong_type", f"expected an object with the keys {', '.join(FIELDS)}, found {_type_name(value)}")
    return value


def _read_parquet(path: Path, on_bad: Callable[[BadRecord], None]) -> Iterator[LocatedExample]:
    size = path.stat().st_size
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            problem = schema_problem(file.schema_arrow)
            if problem is not None:
                kind, message = problem
                on_bad(BadRecord(str(path), 0, kind, f"{message}; the whole file is skipped, {rows:,} rows"))
                return
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(FIELDS)):
                columns = [text_cells(batch.column(name)) for name in FIELDS]
                for cells in zip(*columns, strict=True):
                    row += 1
                    try:
                        example = checked_example(*map(decoded_cell, FIELDS, cells))
                    except Unusable as reason:
                        on_bad(BadRecord(str(path), row, reason.kind, str(reason)))
                    else:
                        yield LocatedExample(row, size * row // rows, example)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise
        where = f"after row {row:,}" if row else "from the start"
        raise UserError(
            f"{path}: not readable as Parquet {where} ({error}); fetch or write it again, or take it out of the input"
        ) from None


def schema_problem(schema: pa.Schema) -> tuple[str, str] | None:
    """What is wrong with the columns of a file as a whole, as (kind, message)."""
    missing = [name for name in FIELDS if name not in schema.names]
    if missing:
        return (
            "missing_key",
            f"missing column {', '.join(map(repr, missing))}; found {', '.join(schema.names) or 'none'}",
        )
    for name in FIELDS:
        column = schema.field(name).type
        values = column.value_type if pa.types.is_dictionary(column) else column
        # A column without type holds nulls alone: its rows are reported one by one.
        if values not in _TEXT_TYPES and not pa.types.is_null(values):
            return "wrong_type", f"column {name!r} is of type {column}, expected strings"
    return None


_TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())


def text_cells(column: pa.Array) -> list[str | bytes | None]:
    """The values of a text column; as bytes when one of them is not valid UTF-8, which Arrow does not check."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return list(column.cast(pa.large_binary()).to_pylist())


def decoded_cell(name: str, cell: str | bytes | None) -> str | None:
    if not isinstance(cell, bytes):
        return cell
    try:
        return cell.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("invalid_utf8", f"{name!r} is not valid UTF-8 at byte {error.start}") from None


def example_of(values: Mapping[str, Any]) -> Example:
    """The record that a mapping holds, its thinking stripped."""
    missing = [name for name in FIELDS if name not in values]
    if missing:
        raise Unusable("missing_key", f"missing {', '.join(map(repr, missing))}; found {', '.join(values) or 'no key'}")
    return checked_example(values["condition"], values["instruction"], values["response"])


def checked_example(condition: Any, instruction: Any, response: Any) -> Example:
    """The record of three values of any type, its thinking stripped."""
    if not type(condition) is type(instruction) is type(response) is str:
        values = zip(FIELDS, (condition, instruction, response), strict=True)
        name, value = next((name, value) for name, value in values if not isinstance(value, str))
        raise Unusable("wrong_type", f"{name!r} must be a string, found {_type_name(value)}")
    if (size := len(condition) + len(instruction) + len(response)) > MAX_RECORD_BYTES:
        raise Unusable("too_large", f"{size:,} characters of text, expected at most {MAX_RECORD_BYTES:,}")
    try:
        parse_condition(condition)
    except UserError as error:
        raise Unusable("unknown_tag", str(error)) from None
    kept = strip_thinking(response)
    if not kept or kept.isspace():
        stripped = " once thinking is stripped" if response.strip() else ""
        raise Unusable("empty_response", f"the response is empty{stripped}")
    return Example(condition, instruction, kept)


_TYPE_NAMES: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _type_name(value: object) -> str:
    """What JSON calls the type of a value."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def write_jsonl(path: Path, examples: Iterable[Example]) -> int:
    """Write records as JSON lines, whole or not at all; returns how many."""
    written = 0
    with whole_file(path) as beside, beside.open("wb") as file:
        for example in examples:
            file.write(orjson.dumps(asdict(example), option=orjson.OPT_APPEND_NEWLINE))
            written += 1
    return written


def write_parquet(path: Path, examples: Iterable[Example]) -> int:
    """Write records as Parquet, whole or not at all; returns how many."""
    written = 0
    remaining = iter(examples)
    schema = pa.schema([(name, pa.string()) for name in FIELDS])
    with whole_file(path) as beside, pq.ParquetWriter(beside, schema, compression="zstd") as file:
        while rows := [astuple(example) for example in islice(remaining, 64 * _BATCH_ROWS)]:
            file.write_table(pa.table(dict(zip(FIELDS, zip(*rows, strict=True), strict=True)), schema=schema))
            written += len(rows)
    return written
