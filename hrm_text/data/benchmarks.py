"""The questions of the evaluation's benchmarks, read from their upstream files below one folder.

    BENCHMARKS/gsm8k/test.jsonl, BENCHMARKS/mmlu/all/test-00000-of-00001.parquet, ...

A question is the text that a model is to answer: with its passage where it has one, without the options to choose from,
which are short and stand in a layout of their own. Any other BENCHMARKS/<name>.jsonl with the key ``question`` or
``text`` is a benchmark as well. Files are JSON lines, Parquet, JSON (one object), or CSV without a header.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from hrm_text.contracts import UserError

MAX_LINE_BYTES = 1 << 24
_CSV_COLUMNS = ("question", "A", "B", "C", "D", "answer")
"""Of MMLU's own files."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where the questions of a benchmark stand."""

    name: str
    """Of its folder, and in scores."""
    files: tuple[str, ...]
    """Patterns below the folder, one for each layout that it is published in; the first that matches any file counts,
    so that a set in two layouts is not read twice."""
    texts: tuple[str, ...]
    """Columns that hold the text, each a piece of its own."""
    number: str | None = None
    """Column with the identifier of a question."""


_ARC = ("{0}/test-*.parquet", "test-*.parquet", "{0}-Test.jsonl")
_WINOGRANDE = ("winogrande_debiased/validation-*.parquet", "validation-*.parquet", "dev.jsonl")
_MMLU = ("all/test-*.parquet", "*/test-*.parquet", "test/*_test.csv", "test.jsonl")

_KNOWN = (
    Benchmark("gsm8k", ("main/test-*.parquet", "test.jsonl"), ("question",)),
    Benchmark("math", ("*/test-*.parquet", "test/*/*.json", "test-*.parquet", "test.jsonl"), ("problem",)),
    Benchmark("drop", ("data/validation-*.parquet", "validation*.jsonl"), ("passage", "question"), "query_id"),
    Benchmark("mmlu", _MMLU, ("question",)),
    Benchmark("mmlu_pro", ("data/test-*.parquet", "test.jsonl"), ("question",), "question_id"),
    Benchmark("arc_challenge", tuple(file.format("ARC-Challenge") for file in _ARC), ("question",), "id"),
    Benchmark("arc_easy", tuple(file.format("ARC-Easy") for file in _ARC), ("question",), "id"),
    Benchmark("hellaswag", ("data/validation-*.parquet", "hellaswag_val.jsonl"), ("ctx",), "ind"),
    Benchmark("winogrande", _WINOGRANDE, ("sentence",)),
    Benchmark("boolq", ("data/validation-*.parquet", "dev.jsonl"), ("passage", "question")),
    Benchmark("aime", ("**/*.parquet", "**/*.jsonl"), ("problem",)),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _KNOWN}
"""Of the evaluation."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a benchmark."""

    benchmark: str
    index: int
    """Its place in the benchmark, from 0: files by name, rows in order."""
    number: str
    """What the benchmark calls it; its index where it has no name for it."""
    texts: tuple[str, ...]


def read_benchmarks(folder: Path) -> list[Question]:
    """The questions of all benchmarks below a folder, in the order of ``BENCHMARKS``, then other files by name.

    Raises:
        UserError: there is no such folder or no benchmark in it, a file is damaged, or a row has no question.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it holds the test sets, such as gsm8k/test.jsonl")
    questions: list[Question] = []
    for benchmark in BENCHMARKS.values():
        below = folder / benchmark.name
        if below.is_dir():
            questions += _read_known(below, benchmark)
    for path in sorted(folder.glob("*.jsonl")):
        if any(question.benchmark == path.stem for question in questions):
            raise UserError(f"{path}: {folder / path.stem} holds a benchmark of that name too; rename the file")
        questions += _read_other(path)
    if not questions:
        raise UserError(
            f"{folder}: no benchmark found; expected folders named {', '.join(BENCHMARKS)}, "
            "or files <name>.jsonl with the key question or text"
        )
    return questions


def _read_known(below: Path, benchmark: Benchmark) -> list[Question]:
    files = next((found for pattern in benchmark.files if (found := _matching(below, pattern))), None)
    if files is None:
        raise UserError(f"{below}: expected one of {', '.join(benchmark.files)}; put the test set there")
    questions: list[Question] = []
    for path in files:
        for place, row in _rows(path):
            texts = tuple(_text(row, column, place) for column in benchmark.texts)
            index = len(questions)
            number = row.get(benchmark.number) if benchmark.number else None
            questions.append(Question(benchmark.name, index, str(index if number is None else number), texts))
    return questions


def _matching(below: Path, pattern: str) -> list[Path]:
    return sorted(path for path in below.glob(pattern) if path.is_file())


def _read_other(path: Path) -> list[Question]:
    questions = []
    for index, (place, row) in enumerate(_rows(path)):
        column = "question" if "question" in row else "text"
        questions.append(Question(path.stem, index, str(row.get("id", index)), (_text(row, column, place),)))
    return questions


def _text(row: Mapping[str, Any], column: str, place: str) -> str:
    value = row.get(column)
    if isinstance(value, Mapping):
        value = value.get("stem")  # ARC's own files have the question and its options in one object
    if not isinstance(value, str):
        found = f"its keys are {', '.join(row)}" if value is None else f"it is {type(value).__name__}"
        raise UserError(f"{place}: expected a text as {column}, {found}; this is not the layout of the test set")
    return value


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file, and where each stands, for messages."""
    readers = {".jsonl": _jsonl, ".parquet": _parquet, ".json": _json, ".csv": _csv}
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); fetch it again") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes is no question")
            if line.strip():
                yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield str(path), _object(path.read_bytes(), str(path))


def _object(text: bytes, place: str) -> Mapping[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object, found {type(value).__name__}")
    return value


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            rows = 0
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    rows += 1
                    yield f"{path}: row {rows}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable Parquet ({error}); fetch the file again") from None


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                yield f"{path}: row {number}", dict(zip(_CSV_COLUMNS, row, strict=False))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable CSV ({error}); fetch the file again") from None
