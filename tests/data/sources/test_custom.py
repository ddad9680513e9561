from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hrm_text.contracts import Example, UserError
from hrm_text.data.clean import clean_datasets, mixture_names
from hrm_text.data.records import BadRecords, find_record_files, read_records
from hrm_text.data.sources.custom import MOST_TURNS, alpaca, chat, load_module, load_sources
from hrm_text.data.sources.upstream import DATASETS, Drop, find_dataset
from hrm_text.data.sources.upstream_files import select_columns


@pytest.fixture(autouse=True)
def same_datasets() -> Iterator[None]:
    before = dict(DATASETS)
    yield
    DATASETS.clear()
    DATASETS.update(before)


def cleaned(name: str, row: dict[str, Any]) -> list[Example | Drop]:
    found = find_dataset(name)
    selected = select_columns(row, found.columns)
    assert not isinstance(selected, str)
    return list(found.clean(selected))


def openai(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_both_layouts_of_a_chat_give_the_same_examples(layout: str) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "Farewell."),
    ]
    row = openai(*turns)
    if layout == "conversations":
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
    assert cleaned("chat", row) == [
        Example("direct", "Be brief.\n\nHi", "Hello."),
        Example("direct", "Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Bye", "Farewell."),
    ]


def test_what_is_said_before_an_answer_is_its_instruction() -> None:
    assert cleaned("chat", openai(("user", "a"), ("user", "b"), ("assistant", "c"))) == [
        Example("direct", "a\n\nb", "c")
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert cleaned("chat", openai(("user", parts), ("assistant", "c"))) == [Example("direct", "a\nb", "c")]
    assert cleaned("chat", openai(("user", "a"), ("assistant", "c")) | {"condition": "synth,cot"}) == [
        Example("synth,cot", "a", "c")
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "neither messages nor conversations"),
        (openai(), "no answer"),
        (openai(("user", "a")), "no answer"),
        (openai(("user", "a"), ("tool", "b"), ("assistant", "c")), "a turn of another role"),
        (openai(("user", None), ("assistant", "c")), "a turn that is not text"),
        (openai(("user", [{"type": "image"}]), ("assistant", "c")), "a turn that is not text"),
    ],
)
def test_a_chat_without_a_usable_answer_is_dropped(row: dict[str, Any], reason: str) -> None:
    assert cleaned("chat", row) == [Drop(reason)]


def test_a_chat_without_end_is_cut() -> None:
    row = openai(*[turn for i in range(1000) for turn in (("user", f"q{i}"), ("assistant", f"a{i}"))])
    results = cleaned("chat", row)
    assert len(results) == MOST_TURNS + 1 and results[-1] == Drop(f"after {MOST_TURNS} answers")


def test_alpaca_joins_the_input_where_there_is_one() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house"}
    assert cleaned("alpaca", row) == [Example("direct", "Translate.\n\nHaus", "house")]
    for empty in ("", " ", None):
        assert cleaned("alpaca", row | {"input": empty}) == [Example("direct", "Translate.", "house")]


def test_ready_readers_read_files_and_are_not_part_of_all(tmp_path: Path) -> None:
    rows = [openai(("user", "a"), ("assistant", "b")), openai(("assistant", "opens")), {"messages": [3]}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (report,) = clean_datasets(["chat"], tmp_path / "out", tmp_path / "in")
    assert report.tally.dropped == {"empty instruction": 1, "the cleaner raised AttributeError": 1}
    bad = BadRecords()
    assert [list(read_records(file.path, bad)) for file in find_record_files([tmp_path / "out"])] == [
        [Example("direct", "a", "b")]
    ]
    assert not bad.total
    assert not {"chat", "alpaca"} & set(mixture_names())
    assert chat.__doc__ and alpaca.__doc__


OWN = '''
from hrm_text.contracts import Example
from hrm_text.data.sources.upstream import dataset

@dataset(
    "my_faq", group="mine", licence="mine", home="here", condition="direct",
    columns={"ask": "string", "tell": "string"}, files=("*.jsonl",), hub=None, rows=2, megabytes=1,
)
def faq(row):
    """Questions and answers."""
    yield Example("direct", row["ask"], row["tell"])
'''


def test_a_file_of_your_own_is_loaded_once_and_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(OWN)
    load_sources([tmp_path / "my.py"])
    load_sources([tmp_path / "my.py"])
    assert find_dataset("my_faq").description == "Questions and answers"
    assert "my_faq" not in mixture_names()


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "my.py").write_text(f"number = {number}")
    modules = [load_module(tmp_path / str(number) / "my.py") for number in (1, 2)]
    assert [module.number for module in modules] == [1, 2]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("x = 1\n", "registers no dataset"),
        ("x = 1\ny = x / 0\n", "my.py:2: could not be loaded: ZeroDivisionError"),
        ("def (", "could not be loaded: SyntaxError"),
        (
            OWN.replace("my_faq", "chat"),
            "my.py:5: could not be loaded: AssertionError: dataset 'chat' is registered twice",
        ),
        (OWN + "1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_file_that_fails_says_where_and_leaves_nothing_behind(tmp_path: Path, text: str, match: str) -> None:
    before = dict(DATASETS)
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(UserError, match=match):
        load_sources([tmp_path / "my.py"])
    assert before == DATASETS
    with pytest.raises(UserError, match="no such file"):
        load_sources([tmp_path / "your.py"])
