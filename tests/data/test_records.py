from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import Example, UserError
from hrm_text.data.records import (
    MAX_RECORD_BYTES,
    BadRecord,
    BadRecords,
    find_record_files,
    locate_records,
    read_records,
    read_texts,
    write_jsonl,
    write_parquet,
)

GOOD = b'{"condition": "synth,cot", "instruction": "1 + 1?", "response": "2"}'

# One line for every way in which a record can be bad, but for too_long, which needs a tokenizer.
BAD_LINES = {
    b"not json at all": "not_json",
    b'{"condition": "cot", "instruction": "a", "response": "b"': "not_json",
    b'{"condition": "cot", "instruction": "\\ud800", "response": "b"}': "not_json",
    b'{"condition": "cot", "instruction": NaN, "response": "b"}': "not_json",
    b'{"condition": "cot", "response": "b"}': "missing_key",
    b"{}": "missing_key",
    b'{"condition": "cott", "instruction": "a", "response": "b"}': "unknown_tag",
    b'{"condition": "", "instruction": "a", "response": "b"}': "unknown_tag",
    b'{"condition": "cot,", "instruction": "a", "response": "b"}': "unknown_tag",
    b'{"condition": "cot", "instruction": null, "response": "b"}': "wrong_type",
    b'{"condition": "cot", "instruction": "a", "response": 3}': "wrong_type",
    b'{"condition": ["cot"], "instruction": "a", "response": "b"}': "wrong_type",
    b'["cot", "a", "b"]': "wrong_type",
    b"17": "wrong_type",
    b'{"condition": "cot", "instruction": "\xff\xfe", "response": "b"}': "invalid_utf8",
    b'{"condition": "cot", "instruction": "a", "response": ""}': "empty_response",
    b'{"condition": "cot", "instruction": "a", "response": " \\n"}': "empty_response",
    b'{"condition": "cot", "instruction": "a", "response": "<think>hm</think>\\n"}': "empty_response",
    b'{"condition": "cot", "instruction": "a", "response": "<think>cut off"}': "empty_response",
}


def read(path: Path) -> tuple[list[Example], list[BadRecord]]:
    bad: list[BadRecord] = []
    return list(read_records(path, bad.append)), bad


def refuse(bad: BadRecord) -> None:
    raise AssertionError(bad)


@pytest.mark.parametrize(("line", "kind"), BAD_LINES.items(), ids=[line.decode("latin-1") for line in BAD_LINES])
def test_a_bad_line_is_reported_where_it_is_and_its_neighbours_are_kept(tmp_path: Path, line: bytes, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    examples, bad = read(path)
    assert examples == [Example("synth,cot", "1 + 1?", "2")] * 2
    assert [(b.file, b.line, b.kind) for b in bad] == [(str(path), 2, kind)]


def test_every_line_is_yielded_or_reported_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, *BAD_LINES, GOOD]) + b"\n")
    bad = BadRecords(keep=3)
    assert len(list(read_records(path, bad))) == 2
    assert bad.total == len(BAD_LINES)
    for kind in set(BAD_LINES.values()):
        assert bad.counts[kind] == list(BAD_LINES.values()).count(kind)
        assert f"{bad.counts[kind]} {kind}" in bad.summary()
    assert [b.line for b in bad.examples] == [2, 3, 4]
    assert f"{path}:2: " in bad.summary()
    assert f"and {len(BAD_LINES) - 3} more" in bad.summary()
    assert BadRecords().summary() == "no bad records"


def test_strict_stops_at_the_first_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, b"{}", b"[]"]))
    records = read_records(path, BadRecords(strict=True))
    assert [next(records), next(records)] == [Example("synth,cot", "1 + 1?", "2")] * 2
    with pytest.raises(UserError, match=r"a\.jsonl:3: missing 'condition', 'instruction', 'response'"):
        next(records)


def test_messages_say_what_was_found_and_what_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"condition": "synth,cott", "instruction": "a", "response": "b"}\n'
        '{"condition": "cot", "instruction": null, "response": "b"}\n'
    )
    _, (tag, null) = read(path)
    assert "'cott'" in tag.message
    assert "did you mean 'cot'" in tag.message
    assert "direct, cot, noisy, synth" in tag.message
    assert null.message == "'instruction' must be a string, found null"


def test_blank_lines_a_byte_order_mark_and_other_keys_are_no_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD.replace(b"}", b', "id": 7}') + b"\r\n")
    located = list(locate_records(path, refuse))
    assert [item.line for item in located] == [1, 4]
    assert located[-1].bytes_read == path.stat().st_size


def test_thinking_is_stripped_from_responses(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [Example("cot", "<think>stays</think>", "<think>a\nb</think>\n\n42")])
    assert read(path) == ([Example("cot", "<think>stays</think>", "42")], [])


texts = st.text(st.characters(exclude_categories=["Cs"]))
answers = texts.filter(lambda text: bool(text.strip()) and "<think>" not in text)
conditions = st.lists(st.sampled_from(["direct", "cot", "noisy", "synth"]), min_size=1, max_size=4).map(",".join)


@given(st.lists(st.builds(Example, conditions, texts, answers)))
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, examples: list[Example]) -> None:
    folder = tmp_path_factory.mktemp("records")
    assert write_jsonl(folder / "a.jsonl", examples) == len(examples)
    assert write_parquet(folder / "a.parquet", iter(examples)) == len(examples)
    assert read(folder / "a.jsonl") == (examples, [])
    assert read(folder / "a.parquet") == (examples, [])


def column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """A column that may hold invalid UTF-8, as files of other writers do."""
    if pa.types.is_string(kind):
        return pa.array(values, pa.binary()).view(kind)
    return pa.array(values, pa.binary()).cast(kind)


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_binary()], ids=str)
def test_a_bad_parquet_row_is_reported_and_its_neighbours_are_kept(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    rows = [
        (b"cot", b"a", b"1"),
        (b"cot", None, b"2"),
        (b"cot", b"\xff", b"3"),
        (b"cod", b"a", b"4"),
        (b"cot", b"a", b""),
        (b"cot", "東京".encode(), b"6"),
    ]
    names = ("condition", "instruction", "response")
    columns = {name: column(list(values), kind) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    pq.write_table(pa.table(columns), path, row_group_size=2)
    examples, bad = read(path)
    assert examples == [Example("cot", "a", "1"), Example("cot", "東京", "6")]
    found = [(b.line, b.kind) for b in bad]
    assert found == [(2, "wrong_type"), (3, "invalid_utf8"), (4, "unknown_tag"), (5, "empty_response")]


def test_parquet_columns_may_be_dictionaries_and_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "response": ["x", "y"],
            "extra": [1, 2],
            "condition": pa.array(["cot", "cot"]).dictionary_encode(),
            "instruction": pa.array(["a", "b"], pa.large_string()),
        }
    )
    pq.write_table(table, path)
    assert read(path) == ([Example("cot", "a", "x"), Example("cot", "b", "y")], [])


@pytest.mark.parametrize(
    ("columns", "kind", "named"),
    [
        ({"condition": ["cot"] * 3, "instruction": ["a"] * 3}, "missing_key", "'response'"),
        ({"condition": ["cot"] * 3, "instruction": ["a"] * 3, "response": [1, 2, 3]}, "wrong_type", "int64"),
    ],
)
def test_a_parquet_file_with_a_wrong_column_is_one_error(
    tmp_path: Path, columns: dict[str, list[Any]], kind: str, named: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    examples, bad = read(path)
    assert not examples
    assert [(b.line, b.kind) for b in bad] == [(0, kind)]
    assert named in bad[0].message
    assert "3 rows" in bad[0].message


def test_a_file_that_is_damaged_missing_or_of_another_kind_says_so(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    write_parquet(whole, [Example("cot", "a", "b")] * 5000)
    damaged = tmp_path / "a.parquet"
    damaged.write_bytes(whole.read_bytes()[:-20])
    for path, message in (
        (damaged, "not readable as Parquet"),
        (tmp_path / "b.jsonl", "no such file"),
        (tmp_path / "c.csv", "expected .jsonl or .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_records(path, refuse))


def test_folders_are_walked_and_names_are_paths_below_them(tmp_path: Path) -> None:
    for name in ("flan/sub/a.parquet", "b.jsonl", "notes.txt", ".hidden/c.jsonl", "store.jsonl/tokens.npy"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    single = tmp_path / "elsewhere" / "z.jsonl"
    single.parent.mkdir()
    single.touch()
    found = find_record_files([single, tmp_path / "in"])
    assert [file.safe_name for file in found] == ["b.jsonl", "flan__sub__a.parquet", "z.jsonl"]
    assert found[1].path == tmp_path / "in" / "flan/sub/a.parquet"


def test_names_that_collide_and_inputs_without_records_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jsonl").touch()
    (tmp_path / "a__b.jsonl").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").touch()
    with pytest.raises(UserError, match=r"would both be called 'a__b\.jsonl'"):
        find_record_files([tmp_path])
    with pytest.raises(UserError, match="no record file found"):
        find_record_files([tmp_path / "empty"])
    with pytest.raises(UserError, match="no such file or folder"):
        find_record_files([tmp_path / "absent"])
    with pytest.raises(UserError, match=r"ending in \.jsonl or \.parquet"):
        find_record_files([tmp_path / "x.csv"])


def test_texts_are_instructions_and_responses_in_turn(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [Example("cot", "q1", "a1"), Example("cot", "q2", "a2")])
    assert list(read_texts(find_record_files([tmp_path]), refuse)) == ["q1", "a1", "q2", "a2"]


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def examples() -> Any:
        yield Example("cot", "a", "b")
        raise RuntimeError("the source broke")

    for write, name in ((write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")):
        with pytest.raises(RuntimeError, match="the source broke"):
            write(tmp_path / name, examples())
    assert not list(tmp_path.iterdir())


def test_jsonl_is_one_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [Example("cot", "line\nbreak", "\u2028")] * 2)
    assert [json.loads(line)["instruction"] for line in path.read_bytes().splitlines()] == ["line\nbreak"] * 2


def test_a_line_without_end_is_skipped_and_never_held(tmp_path: Path) -> None:
    good = json.dumps({"condition": "direct", "instruction": "q", "response": "r"})
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write(good + "\n" + '{"condition": "direct", "instruction": "')
        for _ in range(100):
            file.write("x" * (1 << 20))
        file.write('", "response": "r"}\n' + good + "\n")
    bad = BadRecords()
    tracemalloc.start()
    try:
        found = list(locate_records(path, bad))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [located.line for located in found] == [1, 3]
    assert found[-1].bytes_read == path.stat().st_size
    assert bad.counts == {"too_large": 1}
    assert peak < 3 * MAX_RECORD_BYTES


def test_a_cell_without_end_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [Example("direct", "q", "x" * MAX_RECORD_BYTES), Example("cot", "q", "r")])
    bad = BadRecords()
    assert [example.condition for example in read_records(path, bad)] == ["cot"]
    assert bad.counts == {"too_large": 1}
