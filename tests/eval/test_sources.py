from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hrm_text.contracts import UserError
from hrm_text.eval.sources import HubRows, LocalRows
from hrm_text.eval.task import Dataset

ROWS = [{"question": 'a\u2028b, "c"', "answer": "1"}, {"question": "d", "answer": "2"}]
SET = Dataset("someone/sums", config="main", folder="sums")


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.name.partition(".")[2]:
        case "jsonl":
            path.write_bytes(lines(rows))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines(rows)))
        case "json":
            path.write_text(json.dumps(rows))
        case "csv":
            path.write_text('question,answer\n"a\u2028b, ""c""",1\nd,2\n')
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
@pytest.mark.parametrize("place", ["sums", "sums/data", "sums/main", "sums/data/main"])
def test_every_format_gives_the_same_rows_from_every_place(tmp_path: Path, ending: str, place: str) -> None:
    write(tmp_path / place / f"test-00000-of-00001.{ending}")
    write(tmp_path / place / f"tests.{ending}", [{"question": "of another split"}])
    assert list(LocalRows(tmp_path)(SET)) == ROWS


def test_nested_columns_are_as_the_hub_gives_them(tmp_path: Path) -> None:
    rows = [{"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}]
    write(tmp_path / "sums" / "test.parquet", rows)
    assert list(LocalRows(tmp_path)(SET)) == rows


def test_parts_come_in_the_order_of_their_names_and_the_own_configuration_first(tmp_path: Path) -> None:
    for number in (1, 0):
        write(tmp_path / "sums/main" / f"test-0000{number}.jsonl", [{"n": number}])
    write(tmp_path / "sums" / "test.jsonl", [{"n": "of all configurations"}])
    assert [row["n"] for row in LocalRows(tmp_path)(SET)] == [0, 1]


def test_provenance_changes_with_a_byte(tmp_path: Path) -> None:
    write(tmp_path / "sums/test.jsonl")
    before = LocalRows(tmp_path).provenance(SET)
    assert list(before["files"]) == ["sums/test.jsonl"]
    assert LocalRows(tmp_path).provenance(SET) == before
    (tmp_path / "sums/test.jsonl").write_bytes(lines(ROWS).replace(b"2", b"3"))
    assert LocalRows(tmp_path).provenance(SET) != before


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data .*none: no such folder"):
        LocalRows(tmp_path / "none")
    with pytest.raises(UserError, match=r"sums: no file of someone/sums's split 'test'; expected test\*"):
        LocalRows(tmp_path)(SET)
    write(tmp_path / "sums/test.jsonl")
    for content, message in (
        (b'{"a": 1}\n{"a": \n', r"test.jsonl:2: not valid JSON"),
        (b'{"a": 1}\n[1]\n', r"test.jsonl: row 2: expected an object, found list"),
        (b"\xff\xfe", r"test.jsonl: cannot be read"),
    ):
        (tmp_path / "sums/test.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            LocalRows(tmp_path)(SET)


class Loaded(list[dict[str, Any]]):
    info = SimpleNamespace(download_checksums={"hf://datasets/someone/sums@" + "0a" * 20 + "/test.parquet": {}})


def test_the_hub_is_asked_once_and_its_commit_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*where: Any, split: str, revision: str) -> Loaded:
        calls.append((*where, split, revision))
        return Loaded(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    hub = HubRows()
    assert list(hub(SET)) == ROWS
    assert hub.provenance(SET)["revision"] == "0a" * 20
    assert calls == [("someone/sums", "main", "test", "main")]


def test_a_hub_that_does_not_answer_points_at_local_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*where: Any, **options: Any) -> Loaded:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"(?s)someone/sums cannot be read from the hub: no network.*--data"):
        HubRows()(SET)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'hrm-text\[eval\]'.*--data"):
        HubRows()(SET)
