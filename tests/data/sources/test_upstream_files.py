from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import UserError
from hrm_text.data.sources import upstream_files
from hrm_text.data.sources.upstream import Row, TextLayout
from hrm_text.data.sources.upstream_files import BadRow, NumberedRow, read_rows

COLUMNS = {"q": "string", "n": "number or null"}
ROWS: list[dict[str, Any]] = [
    {"q": "one <|im_end|> \u4e00\u2028x", "n": 1},
    {"q": "two", "n": None},
    {"q": "", "n": 2.5},
]


def read(
    path: Path, columns: dict[str, str] | None = None, text: TextLayout | None = None
) -> tuple[list[tuple[int, Row]], list[tuple[int, str]]]:
    bad: list[BadRow] = []
    good = list(read_rows(path, columns or COLUMNS, bad.append, text))
    assert all(isinstance(row, NumberedRow) for row in good)
    return [(row.line, row.row) for row in good], [(b.line, b.reason) for b in bad]


def compressed(path: Path, content: bytes) -> Path:
    """The content in a file, compressed as its name says."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)
    return path


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["q", "n"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str, compression: str) -> None:
    content = as_csv(ROWS) if kind == ".csv" else as_lines(ROWS)
    good, bad = read(compressed(tmp_path / f"a{kind}{compression}", content))
    assert [row for _, row in good] == ROWS
    assert not bad


def test_parquet_gives_the_same_rows_and_only_the_columns(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row | {"other": "x"} for row in ROWS])
    pq.write_table(table, tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert good == list(enumerate(ROWS, start=1))
    assert not bad


@pytest.mark.parametrize("document", ["list", "indented list", "object", "indented object", "lines"])
def test_json_is_a_document_or_lines(tmp_path: Path, document: str) -> None:
    rows = ROWS[:1] if "object" in document else ROWS
    value: Any = rows[0] if "object" in document else rows
    indent = 2 if "indented" in document else None
    content = as_lines(rows) if document == "lines" else json.dumps(value, indent=indent).encode()
    for start in (b"", b"\xef\xbb\xbf"):  # a byte order mark
        path = compressed(tmp_path / "a.json", start + content)
        assert read(path) == (list(enumerate(rows, start=1)), [])


BAD_LINES = {
    b'{"q": "a"': "not JSON",
    b'{"q": "\xff"}': "not valid UTF-8",
    b'{"q": "\\ud800"}': "not JSON",
    b'["a"]': "not a JSON object",
    b"{}": "no column 'q'",
    b'{"q": null}': "column 'q' is of type null, not string",
    b'{"q": 3}': "column 'q' is of type number, not string",
    b'{"q": "a", "n": true}': "column 'n' is of type boolean, not number or null",
    b'{"q": "a", "n": ["b"]}': "column 'n' is of type list, not number or null",
    b'{"q": {"a": 1}}': "column 'q' is of type object, not string",
    b'{"q": "' + b"x" * 2000 + b'"}': "line too long",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=[line.decode("latin-1")[:30] for line in BAD_LINES])
def test_a_bad_line_is_told_and_its_neighbours_are_kept(
    tmp_path: Path, line: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_files, "LINE_BYTES", 1000)
    for kind in (".jsonl", ".jsonl.gz", ".json"):
        path = compressed(tmp_path / f"a{kind}", b'{"q": "a"}\n\n' + line + b'\n{"q": "b"}')
        good, bad = read(path)
        assert good == [(1, {"q": "a", "n": None}), (4, {"q": "b", "n": None})]
        assert bad == [(3, reason)]


@given(st.lists(st.integers(0, 25), max_size=8), st.booleans())
def test_lines_up_to_the_bound_are_kept_and_longer_ones_counted(lengths: list[int], ends: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream_files, "LINE_BYTES", 10)
        text = b"\n".join(b"x" * length for length in lengths) + (b"\n" if ends else b"")
        bad: list[BadRow] = []
        good = [line.rstrip(b"\n") for _, line in upstream_files._lines(io.BytesIO(text), bad.append)]
        expected = text.split(b"\n")[: -1 if text.endswith(b"\n") or not text else None]
        assert good == [line for line in expected if len(line) <= 10]
        assert [b.line for b in bad] == [number for number, line in enumerate(expected, 1) if len(line) > 10]


def test_a_huge_line_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(upstream_files, "LINE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'\n{"q": "after"}\n')
    tracemalloc.start()
    good, bad = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert good == [(2, {"q": "after", "n": None})] and bad == [(1, "line too long")]
    assert peak < 8 << 20


def test_a_list_too_large_to_be_read_as_a_whole_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compressed(tmp_path / "a.json", json.dumps([{"q": "a"}] * 100, indent=1).encode())
    assert len(read(path)[0]) == 100
    monkeypatch.setattr(upstream_files, "DOCUMENT_BYTES", 500)
    with pytest.raises(UserError, match="jq -c"):
        read(path)


@given(
    st.lists(
        st.fixed_dictionaries({"q": st.text(st.characters(codec="utf-8", exclude_characters="\x00\r")), "n": st.none()})
    )
)
def test_csv_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(as_csv(rows))
    good, bad = read(path)
    assert [row for _, row in good] == rows and not bad


def test_bad_rows_of_csv_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_files, "LINE_BYTES", 100)
    lines = [b"q,n", b"a,1", b"a", b"a,b,c", b'"\xff', b'x",2', b"b,word", b"x" * 200 + b",1", b'"a\nb",2', b'c,""']
    # A quote that is never closed: its row ends where it is too long, and the next line is a row again.
    lines += [b'"never', b"y" * 60, b"y" * 60, b"d,4"]
    good, bad = read(compressed(tmp_path / "a.csv", b"\r\n".join(lines)))
    assert [(line, row["q"].replace("\r", "")) for line, row in good] == [(2, "a"), (9, "a\nb"), (11, "c"), (15, "d")]
    assert [row["n"] for _, row in good] == [1, 2, None, 4]
    cells = "another number of cells than the header"
    assert bad == [
        (3, cells),
        (4, cells),
        (5, "not valid UTF-8"),
        (7, "column 'n' is of type string, not number or null"),
        (8, "line too long"),
        (12, "malformed CSV"),
    ]


QA = {"question": "string", "answer": "string"}


def test_alternating_lines_stay_pairs_whatever_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_files, "LINE_BYTES", 50)
    lines = [b"q1", b"a1", b"\xff", b"a2", b"q3", b"z" * 99, b"q4", b"a4\r", b"y" * 99, b"\xfe", b"q6", b"a6", b"q7"]
    good, bad = read(compressed(tmp_path / "a.txt.gz", b"\n".join(lines)), QA, "alternating")
    assert [(line, row["question"], row["answer"]) for line, row in good] == [
        (1, "q1", "a1"),
        (7, "q4", "a4"),
        (11, "q6", "a6"),
        (13, "q7", ""),
    ]
    assert sorted(bad) == [(3, "not valid UTF-8"), (6, "line too long"), (9, "line too long"), (10, "not valid UTF-8")]


def test_problems_and_answers_by_their_headings(tmp_path: Path) -> None:
    text = b"Problem:\nAdd\n1 and 1.\nAnswer:\n$2$\nAnswer:\ntwo\n\nProblem:\nbad \xff\nAnswer:\n1\nProblem:\nopen\n"
    good, bad = read(compressed(tmp_path / "a.txt", text), QA, "problem_answer")
    assert [(line, row["question"], row["answer"]) for line, row in good] == [
        (1, "Add\n1 and 1.", "$2$"),
        (1, "Add\n1 and 1.", "two"),
    ]
    assert bad == [(10, "not valid UTF-8"), (13, "problem without an answer")]
    for content, reason in {b"": "no line 'Problem:'", b"Answer:\n1": "answer without a problem"}.items():
        good, bad = read(compressed(tmp_path / "b.txt", content), QA, "problem_answer")
        assert not good and reason in [why for _, why in bad]


def test_parquet_rows_that_are_not_utf8_or_of_another_type_are_told(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"q": broken, "n": ["x", None, None]}), tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert good == [(3, {"q": "c", "n": None})]
    assert bad == [(1, "column 'n' is of type string, not number or null"), (2, "not valid UTF-8")] or bad == [
        (2, "not valid UTF-8"),
        (1, "column 'n' is of type string, not number or null"),
    ]


def test_parquet_without_a_column_is_told_row_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"other": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([], [(n, "no column 'q'") for n in (1, 2, 3)])
    assert read(tmp_path / "a.parquet", {"other": "number"})[0][2] == (3, {"other": 3})


def test_a_large_row_group_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.array([f"{i:08d}" * 512 for i in range(16_384)])  # 64 MiB, 4 KiB a row, one row group
    pq.write_table(pa.table({"q": text}), path, compression="none", use_dictionary=False)
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    # A process of its own: the pool's peak is that of the whole process, and Arrow's readers use no other pool.
    code = (
        "import sys, pathlib, pyarrow as pa; from hrm_text.data.sources.upstream_files import read_rows\n"
        "rows = sum(1 for _ in read_rows(pathlib.Path(sys.argv[1]), {'q': 'string'}, print))\n"
        "print(rows, pa.default_memory_pool().max_memory())"
    )
    outcome = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rows, peak = map(int, outcome.stdout.split())
    assert rows == 16_384
    assert peak < 16 << 20


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.parquet", b"not parquet at all", "not readable as .parquet from the start"),
        ("a.parquet", b"", "not readable as .parquet from the start"),
        ("a.jsonl.gz", b"not gzip", "not readable as .jsonl.gz from the start"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS * 9000))[:-2000], "not readable as .jsonl.gz after line"),
        ("a.csv.zst", b"not zstd", "not readable as .csv.zst from the start"),
        ("a.txt", b"a\nb", "how its lines are laid out"),
        ("a.xml", b"", "unknown ending"),
        ("a.parquet.gz", b"", "unknown ending"),
    ],
)
def test_a_damaged_or_unknown_file_fails_by_name(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=match) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_missing_files_and_folders_fail_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").mkdir()
    for name, match in {"a.jsonl": "no such file", "a.parquet": "no such file", "b.jsonl": "is a folder"}.items():
        with pytest.raises(UserError, match=match):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt", ".jsonl.gz", ".csv.zst"])
def test_an_empty_file_has_no_rows(tmp_path: Path, kind: str) -> None:
    path = compressed(tmp_path / f"a{kind}", b"")
    assert read(path, text="alternating") == ([], [])
