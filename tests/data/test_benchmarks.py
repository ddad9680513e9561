from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hrm_text.contracts import UserError
from hrm_text.data import benchmarks
from hrm_text.data.benchmarks import BENCHMARKS, read_benchmarks

PARQUET: dict[str, tuple[dict[str, Any], str]] = {
    "gsm8k/main/test-00000-of-00001.parquet": ({"question": "How many eggs?", "answer": "#### 3"}, "0"),
    "math/algebra/test-00000-of-00001.parquet": ({"problem": "Find x.", "solution": "3"}, "0"),
    "drop/data/validation-00000-of-00001.parquet": (
        {"query_id": "q1", "passage": "It rained.", "question": "What fell?", "answers_spans": {"spans": ["rain"]}},
        "q1",
    ),
    "mmlu/all/test-00000-of-00001.parquet": ({"question": "Why?", "choices": ["a", "b"], "answer": 1}, "0"),
    "mmlu_pro/data/test-00000-of-00001.parquet": ({"question_id": 70, "question": "Why?", "options": ["a"]}, "70"),
    "arc_challenge/ARC-Challenge/test-00000-of-00001.parquet": ({"id": "M1", "question": "Which?"}, "M1"),
    "arc_easy/ARC-Easy/test-00000-of-00001.parquet": ({"id": "M2", "question": "Which one?"}, "M2"),
    "hellaswag/data/validation-00000-of-00001.parquet": ({"ind": 24, "ctx": "A man", "endings": ["runs"]}, "24"),
    "winogrande/winogrande_debiased/validation-00000-of-00001.parquet": ({"sentence": "Ann saw _ ."}, "0"),
    "boolq/data/validation-00000-of-00001.parquet": ({"question": "is it", "answer": True, "passage": "It is."}, "0"),
    "aime/data/train-00000-of-00001.parquet": ({"id": 60, "problem": "Every morning"}, "0"),
}
JSON_LINES = {
    "gsm8k/test.jsonl": {"question": "How many eggs?", "answer": "3"},
    "arc_challenge/ARC-Challenge-Test.jsonl": {"id": "M1", "question": {"stem": "Which?", "choices": []}},
    "hellaswag/hellaswag_val.jsonl": {"ind": 24, "ctx": "A man", "endings": ["runs"]},
    "winogrande/dev.jsonl": {"qID": "3", "sentence": "Ann saw _ ."},
    "boolq/dev.jsonl": {"question": "is it", "title": "It", "passage": "It is.", "answer": True},
}


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_benchmark_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    for file, (row, _) in PARQUET.items():
        parquet(tmp_path / file, [row])
    questions = {question.benchmark: question for question in read_benchmarks(tmp_path)}
    assert list(questions) == list(BENCHMARKS)
    for file, (row, number) in PARQUET.items():
        name = file.partition("/")[0]
        wanted = tuple(row[column] for column in BENCHMARKS[name].texts)
        assert (questions[name].texts, questions[name].number, questions[name].index) == (wanted, number, 0)
    assert questions["drop"].texts == ("It rained.", "What fell?")


def test_layouts_of_the_authors(tmp_path: Path) -> None:
    for file, row in JSON_LINES.items():
        lines(tmp_path / file, row, row)
    for number in (1, 2):
        path = lines(tmp_path / "math" / "test" / "algebra" / f"{number}.json", {"problem": f"Find {number}."})
        assert path.suffix == ".json"
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "test" / "astronomy_test.csv").write_text('"Is it, or\nnot?",a,b,c,d,A\nWhy?,a,b,c,d,B\n')
    questions = read_benchmarks(tmp_path)
    texts = {name: [q.texts for q in questions if q.benchmark == name] for name in BENCHMARKS}
    assert texts["math"] == [("Find 1.",), ("Find 2.",)]
    assert texts["mmlu"] == [("Is it, or\nnot?",), ("Why?",)]
    assert texts["arc_challenge"] == [("Which?",)] * 2
    assert texts["boolq"] == [("It is.", "is it")] * 2
    assert [len(texts[name]) for name in ("gsm8k", "hellaswag", "winogrande")] == [2, 2, 2]


def test_a_set_in_two_layouts_is_read_once(tmp_path: Path) -> None:
    parquet(tmp_path / "mmlu" / "all" / "test-00000-of-00001.parquet", [{"question": "Why?"}])
    parquet(tmp_path / "mmlu" / "astronomy" / "test-00000-of-00001.parquet", [{"question": "Why?"}])
    assert len(read_benchmarks(tmp_path)) == 1


def test_other_files(tmp_path: Path) -> None:
    lines(tmp_path / "mine.jsonl", {"question": "Who?", "id": "w"}, {"text": "<|im_end|> 東京"})
    found = [(q.benchmark, q.index, q.number, q.texts) for q in read_benchmarks(tmp_path)]
    assert found == [("mine", 0, "w", ("Who?",)), ("mine", 1, "1", ("<|im_end|> 東京",))]


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says(message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_benchmarks(tmp_path / "sets")

    says("no such folder")
    (tmp_path / "sets" / "gsm8k").mkdir(parents=True)
    says(r"expected one of main/test-\*.parquet, test.jsonl")
    (tmp_path / "sets" / "gsm8k").rmdir()
    says("no benchmark found; expected folders named gsm8k")
    lines(tmp_path / "sets" / "a.jsonl", {"question": 3})
    says(r"a.jsonl:1: expected a text as question, it is int")
    lines(tmp_path / "sets" / "a.jsonl", {"answer": "3"})
    says(r"expected a text as text, its keys are answer")
    lines(tmp_path / "sets" / "a.jsonl", {"text": "a"}, ["b"])
    says(r"a.jsonl:2: expected an object, found list")
    (tmp_path / "sets" / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    says(r"a.jsonl:1: not valid JSON")
    monkeypatch.setattr(benchmarks, "MAX_LINE_BYTES", 100)
    lines(tmp_path / "sets" / "a.jsonl", {"text": "a" * 200})
    says(r"a.jsonl:1: a line of more than 100 bytes")
    monkeypatch.undo()
    parquet(tmp_path / "sets" / "gsm8k" / "main" / "test-0.parquet", [{"question": "?"}])
    (tmp_path / "sets" / "a.jsonl").rename(tmp_path / "sets" / "gsm8k.jsonl")
    says("holds a benchmark of that name too")
    (tmp_path / "sets" / "gsm8k.jsonl").unlink()
    (tmp_path / "sets" / "gsm8k" / "main" / "test-0.parquet").write_bytes(b"PAR1")
    says("not readable Parquet")
    (tmp_path / "sets" / "gsm8k" / "main" / "test-0.parquet").unlink()
    (tmp_path / "sets" / "mmlu" / "test").mkdir(parents=True)
    lines(tmp_path / "sets" / "gsm8k" / "test.jsonl", {"question": "?"})
    (tmp_path / "sets" / "mmlu" / "test" / "a_test.csv").write_bytes(b"\xff,a,b")
    says("not readable CSV")
