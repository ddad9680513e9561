"""Rows of upstream files, streamed: Parquet, JSON, CSV and text, compressed or not.

A row that cannot be used is reported with its line and the reason, never lost silently. Memory is bounded by one line
(``LINE_BYTES``), one JSON document (``DOCUMENT_BYTES``) or one small batch of a Parquet file, whatever the file's size.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from hrm_text.contracts import UserError
from hrm_text.data.sources.upstream import Row, TextLayout

LINE_BYTES = 64 << 20
"""A longer line is skipped, in pieces, and counted."""
DOCUMENT_BYTES = 256 << 20
"""The largest JSON document that is not one object a line: it is read as a whole."""

ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".txt")
COMPRESSIONS = (".gz", ".zst")

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20
"""What is read at once of every column of a Parquet file; without a buffer it is the column's whole row group."""


@dataclass(frozen=True, slots=True)
class NumberedRow:
    """A row and where it was found."""

    line: int
    """Line of a text file, element of a JSON list, row of a Parquet file; from 1."""
    row: Row


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    reason: str
    """A few fixed words and perhaps the name of a column: bad rows are counted by it."""


OnBad = Callable[[BadRow], None]


def split_endings(path: PurePath) -> tuple[str, str, str]:
    """The name without its endings, the ending that says what is in the file, and that of its compression, if any."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    bare = PurePath(path.name.removesuffix(compression))
    return bare.stem, bare.suffix, compression


def read_rows(
    path: Path, columns: Mapping[str, str], on_bad: OnBad, text: TextLayout | None = None
) -> Iterator[NumberedRow]:
    """Stream the usable rows of a file, cut down to the columns; each other row goes to ``on_bad``.

    Args:
        path: the file; its ending says what it is.
        columns: names and types, as in ``Dataset.columns``.
        on_bad: called for every row that lacks a column, has another type in one, or cannot be read.
        text: the layout of a .txt file.

    Raises:
        UserError: there is no such file, it has another ending, or its bytes are damaged.
    """
    _, ending, compression = split_endings(path)
    if ending not in ENDINGS or (ending == ".parquet" and compression):
        raise UserError(
            f"{path}: unknown ending; expected {', '.join(ENDINGS)}, all but the first perhaps followed by "
            f"{' or '.join(COMPRESSIONS)}"
        )
    if ending == ".txt" and text is None:
        raise UserError(f"{path}: a .txt file, but the dataset does not say how its lines are laid out (text=...)")
    line = 0
    try:
        if ending == ".parquet":
            rows = _read_parquet(path, columns, on_bad)
        elif ending == ".jsonl":
            rows = _read_json_lines(path, on_bad)
        elif ending == ".json":
            rows = _read_json(path, on_bad)
        elif ending == ".csv":
            rows = _read_csv(path, columns, on_bad)
        elif text == "alternating":
            rows = _read_alternating(path, on_bad)
        else:
            rows = _read_problems(path, on_bad)
        for line, row in rows:
            usable = select_columns(row, columns)
            if isinstance(usable, str):
                on_bad(BadRow(line, usable))
            else:
                yield NumberedRow(line, usable)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; was it moved or deleted while it was being read?") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; change its permissions (chmod a+r)") from None
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        where = f"after line {line:,}" if line else "from the start"
        raise UserError(
            f"{path}: not readable as {ending}{compression} {where} ({error}); fetch it again, or take it out"
        ) from None


def select_columns(row: Row, columns: Mapping[str, str]) -> Row | str:
    """A row's columns alone, or what is wrong with them. A column that may be null may be missing."""
    selected: dict[str, Any] = {}
    for name, wanted in columns.items():
        value = row.get(name)
        kind = _TYPES.get(type(value))
        # Nearly every column is of one type, and then this is all that happens.
        if kind != wanted and kind not in wanted.split(" or "):
            if name not in row:
                return f"no column {name!r}"
            return f"column {name!r} is of type {kind or type(value).__name__}, not {wanted}"
        selected[name] = value
    return selected


_TYPES: dict[type, str] = {
    str: "string", int: "number", float: "number", bool: "boolean", list: "list", dict: "object", type(None): "null",
}  # fmt: skip

_Located = Iterator[tuple[int, Row]]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed as they are read."""
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]  # a GzipFile reads as a BinaryIO does
    elif path.suffix == ".zst":
        with pa.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream, _BUFFER_BYTES) as file:
            yield file
    else:
        with path.open("rb") as file:
            yield file


def _lines(file: BinaryIO, on_bad: OnBad) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1; one that is too long is left out."""
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES and not line.endswith(b"\n"):
            while (piece := file.readline(LINE_BYTES)) and not piece.endswith(b"\n"):
                pass
            on_bad(BadRow(number, "line too long"))
            continue
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte order mark


def _read_json_lines(path: Path, on_bad: OnBad) -> _Located:
    with _opened(path) as file:
        for number, line in _lines(file, on_bad):
            if line.isspace():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                on_bad(BadRow(number, "not JSON" if _is_utf8(line) else "not valid UTF-8"))
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                on_bad(BadRow(number, "not a JSON object"))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_json(path: Path, on_bad: OnBad) -> _Located:
    """One object a line where the first line is an object; else one document: an object, or a list of them."""
    document = _json_document(path)
    if document is None:
        yield from _read_json_lines(path, on_bad)
        return
    for number, row in enumerate(document if isinstance(document, list) else [document], start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            on_bad(BadRow(number, "not a JSON object"))


def _json_document(path: Path) -> Any | None:
    """The document that a file is as a whole; None where it is to be read line by line."""
    with _opened(path) as file:
        first = file.readline(LINE_BYTES + 1).removeprefix(b"\xef\xbb\xbf")
        if not first.lstrip().startswith(b"[") and _parsed(first) is not None:
            return None
        text = first + file.read(DOCUMENT_BYTES + 1 - len(first))
    if len(text) <= DOCUMENT_BYTES:
        return _parsed(text)
    if text.lstrip().startswith(b"["):
        raise UserError(
            f"{path}: one JSON list of more than {DOCUMENT_BYTES >> 20} MiB, which is read as a whole; "
            "write one object a line instead (jq -c '.[]') and call it .jsonl"
        )
    return None


def _parsed(text: bytes) -> Any | None:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _read_csv(path: Path, columns: Mapping[str, str], on_bad: OnBad) -> _Located:
    """Rows of a CSV file with a header; a number is what Python reads as one, everything else is a string."""
    # A quote that is never closed swallows lines up to this limit, and is then an error of that row alone.
    csv.field_size_limit(LINE_BYTES)
    start = 0
    undecodable = False

    def texts(lines: Iterator[tuple[int, bytes]]) -> Iterator[str]:
        nonlocal start, undecodable
        for number, line in lines:
            start = start or number
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:  # its quotes still count, so that the rows below are told apart
                undecodable = True
                yield line.decode("utf-8", "surrogateescape")

    with _opened(path) as file:
        rows = csv.reader(texts(_lines(file, on_bad)))
        header: list[str] | None = None
        while True:
            start, undecodable = 0, False
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error:
                on_bad(BadRow(start, "malformed CSV"))
                continue
            if not cells:
                continue
            if undecodable:
                on_bad(BadRow(start, "not valid UTF-8"))
            elif header is None:
                header = cells
            elif len(cells) != len(header):
                on_bad(BadRow(start, "another number of cells than the header"))
            else:
                yield start, {name: _cell(cell, columns.get(name)) for name, cell in zip(header, cells, strict=True)}


def _cell(cell: str, wanted: str | None) -> str | float | None:
    if wanted is None or wanted == "string":
        return cell
    if not cell and "null" in wanted:
        return None
    if "number" in wanted:
        for number in (int, float):
            try:
                return number(cell)
            except ValueError:
                pass
    return cell


def _text_lines(file: BinaryIO, on_bad: OnBad) -> Iterator[tuple[int, str | None]]:
    """The lines of a text file without their ends; None for one that is too long or not UTF-8, which is reported."""
    too_long: list[BadRow] = []
    for number, line in _lines(file, too_long.append):
        for bad in too_long:
            on_bad(bad)
            yield bad.line, None
        too_long.clear()
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            on_bad(BadRow(number, "not valid UTF-8"))
            yield number, None
    for bad in too_long:
        on_bad(bad)
        yield bad.line, None


def _read_alternating(path: Path, on_bad: OnBad) -> _Located:
    """A question, its answer, a question, ...: a bad line takes its partner along, so that pairs stay pairs."""
    with _opened(path) as file:
        lines = _text_lines(file, on_bad)
        for number, question in lines:
            _, answer = next(lines, (0, ""))
            if question is not None and answer is not None and (question or answer):
                yield number, {"question": question, "answer": answer}


def _read_problems(path: Path, on_bad: OnBad) -> _Located:
    """``Problem:`` and ``Answer:`` on lines of their own; a problem with several answers gives a row for each."""
    with _opened(path) as file:
        asked_at, question, answers = 0, None, 0
        for start, heading, body in _sections(file, on_bad):
            if heading == "Problem:":
                if asked_at and not answers:
                    on_bad(BadRow(asked_at, "problem without an answer"))
                asked_at, question, answers = start, body, 0
            elif not asked_at:
                on_bad(BadRow(start, "answer without a problem"))
            else:
                answers += 1
                if question is not None and body is not None:
                    yield asked_at, {"question": question, "answer": body}
        if not answers:
            on_bad(BadRow(asked_at or 1, "problem without an answer" if asked_at else "no line 'Problem:'"))


def _sections(file: BinaryIO, on_bad: OnBad) -> Iterator[tuple[int, str, str | None]]:
    """The line, the heading and the text of every section; None for a text that cannot be used, which is reported."""
    start, heading, size = 0, "", 0
    held: list[str] | None = []
    for number, line in _text_lines(file, on_bad):
        if line in ("Problem:", "Answer:"):
            if heading:
                yield start, heading, None if held is None else "\n".join(held).strip()
            start, heading, size, held = number, line, 0, []
        elif held is not None:
            size += len(line or "")
            if line is not None and size <= LINE_BYTES:
                held.append(line)
            else:
                held = None
                if line is not None:
                    on_bad(BadRow(start, "section too long"))
    if heading:
        yield start, heading, None if held is None else "\n".join(held).strip()


def _read_parquet(path: Path, columns: Mapping[str, str], on_bad: OnBad) -> _Located:
    number = 0
    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        names = file.schema_arrow.names
        missing = [name for name, kind in columns.items() if name not in names and "null" not in kind.split(" or ")]
        if missing:  # of every row: nothing needs to be read
            for number in range(1, file.metadata.num_rows + 1):
                on_bad(BadRow(number, f"no column {missing[0]!r}"))
            return
        for batch in file.iter_batches(_BATCH_ROWS, columns=[name for name in columns if name in names]):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:  # which Arrow does not check
                rows = [_decoded_row(batch.slice(i, 1)) for i in range(len(batch))]
            for row in rows:
                number += 1
                if row is None:
                    on_bad(BadRow(number, "not valid UTF-8"))
                else:
                    yield number, row


def _decoded_row(batch: pa.RecordBatch) -> Row | None:
    try:
        row: Row = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None
    return row
