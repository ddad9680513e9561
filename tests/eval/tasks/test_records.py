from __future__ import annotations

from pathlib import Path

import pytest

from hrm_text.contracts import Example, UserError
from hrm_text.data.records import write_jsonl, write_parquet
from hrm_text.eval.exact import given_questions
from hrm_text.eval.tasks.records import records_task

EXAMPLES = [
    Example("direct", "Is 2 even?", "yes"),
    Example("direct", "Is 3 even?", "no"),
    Example("direct", "Is 4 even?", "yes"),
    Example("synth,cot", "Is 5 even? Show it.", "5 / 2 = 2.5, so no \u2713"),
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_every_record_is_an_item_under_its_own_condition(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"even.{ending}"
    (write_jsonl if ending == "jsonl" else write_parquet)(path, EXAMPLES)
    task = records_task(path)
    assert task.name == str(path)
    assert [(task.asked_under(q), q.prompt, q.answer) for q in given_questions(task)] == [
        (e.condition, e.instruction, e.response) for e in EXAMPLES
    ]
    assert task.max_new_tokens == len("5 / 2 = 2.5, so no \u2713".encode()) + 1
    assert task.chance == 0.5


def test_chance_is_zero_where_no_response_repeats(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "open.jsonl", EXAMPLES[1:3])
    assert records_task(tmp_path / "open.jsonl").chance == 0


def test_a_bad_record_is_named_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "even.jsonl"
    write_jsonl(path, EXAMPLES)
    path.write_text(path.read_text() + '{"condition": "direct"}\n')
    with pytest.raises(UserError, match=r"even.jsonl:5: .*a score counts every record of its file"):
        records_task(path)


def test_a_file_that_is_absent_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.jsonl: no such file"):
        records_task(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty.jsonl: no records to evaluate"):
        records_task(tmp_path / "empty.jsonl")
