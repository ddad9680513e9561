from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import Example, UserError
from hrm_text.data.records import BadRecords, RecordFile, find_record_files, write_jsonl, write_parquet
from hrm_text.data.text_sample import sample_texts
from hrm_text.data.tokenizer import cut


def write(folder: Path, name: str, rows: int, width: int = 20) -> RecordFile:
    """Records whose texts all differ and name their file and row."""
    examples = (Example("direct", f"{name}/{row:07}".ljust(width, "."), "ok") for row in range(rows))
    path = folder / name
    (write_jsonl if path.suffix == ".jsonl" else write_parquet)(path, examples)
    return RecordFile(path, name)


def drawn(files: list[RecordFile], budget: int, seed: int = 0) -> list[str]:
    return list(sample_texts(files, budget, seed, BadRecords(strict=True)))


def by_file(texts: list[str]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for text in texts:
        if "/" in text:
            sizes[text.partition("/")[0]] += len(text) + 2
    return sizes


def test_files_share_alike_and_what_small_ones_leave_goes_to_the_others(tmp_path: Path) -> None:
    files = [write(tmp_path, "small.jsonl", 10), write(tmp_path, "a.jsonl", 20_000), write(tmp_path, "b.parquet", 9000)]
    sizes = by_file(drawn(files, 50_220))
    assert sizes["small.jsonl"] == 220  # whole
    assert 0.75 * 25_000 < sizes["b.parquet"] <= 25_200
    assert sizes["a.jsonl"] >= 25_000 and 50_000 <= sizes.total() <= 50_300  # read last, it has what the others left
    # A budget above all there is yields all there is.
    assert by_file(drawn(files, 10**9)) == {"small.jsonl": 220, "a.jsonl": 440_000, "b.parquet": 198_000}


@pytest.mark.parametrize("name", ["a.jsonl", "b.parquet"])
def test_the_sample_is_from_all_over_a_file_and_no_row_comes_twice(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, 60_000, width=100)
    texts = [text for text in drawn([file], 1_000_000) if text != "ok" and len(text) == 100]
    rows = [int(text.partition("/")[2].rstrip(".")) for text in texts]
    assert len(rows) == len(set(rows)) > 6000
    by_tenth = Counter(row // 6000 for row in rows)
    assert set(by_tenth) == set(range(10)) and min(by_tenth.values()) > 0.4 * max(by_tenth.values())


def test_the_choice_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        for name in ("a.jsonl", "b.parquet"):
            (tmp_path / folder).mkdir(exist_ok=True)
            write(tmp_path / folder, name, 20_000)
    here, there = find_record_files([tmp_path / "x"]), find_record_files([tmp_path / "y"])
    assert drawn(here, 30_000) == drawn(there[::-1], 30_000) != drawn(here, 30_000, seed=1)


def test_of_many_row_groups_some_are_read(tmp_path: Path) -> None:
    rows = [f"b/{row:07}" + "." * 90 for row in range(10_000)]
    table = pa.table({"condition": ["direct"] * 10_000, "instruction": rows, "response": ["ok"] * 10_000})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=100)
    texts = [text for text in drawn([RecordFile(tmp_path / "b.parquet", "b")], 20_000) if text != "ok"]
    groups = Counter(int(text[2:9]) // 100 for text in texts if len(text) >= 9)
    assert 8 <= len(groups) <= 17 and max(groups) - min(groups) > 70
    assert sum(map(len, texts)) > 10_000


def test_a_line_of_a_gigabyte_is_never_held_and_told_of(tmp_path: Path) -> None:
    """Here 40 MB stand for the gigabyte."""
    path = tmp_path / "a.jsonl"
    line = json.dumps({"condition": "direct", "instruction": "small", "response": "ok"}).encode() + b"\n"
    path.write_bytes(line + b'{"instruction": "' + b"word " * 8_000_000 + b'"}\n' + line)
    bad = BadRecords()
    tracemalloc.start()
    texts = [text for seed in range(2) for text in sample_texts([RecordFile(path, "a")], 10**6, seed, bad)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 35_000_000 and set(texts) <= {"small", "ok"}
    assert set(bad.counts) == {"too_large"}


def test_a_long_text_is_cut_to_its_share(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [Example("direct", "wörd " * 10**6, "ok")] * 3)
    texts = drawn([RecordFile(tmp_path / "a.jsonl", "a")], 100_001)
    assert 90_000 < sum(len(text.encode()) for text in texts) <= 100_001


def test_bad_records_in_the_sample_are_told(tmp_path: Path) -> None:
    good = b'{"condition": "direct", "instruction": "%s", "response": "ok"}\n' % (b"x" * 500)
    (tmp_path / "a.jsonl").write_bytes((good * 3 + b'\xff\xfe{"a"\n' + b"[1]\n\n") * 500)
    bad = BadRecords()
    texts = list(sample_texts([RecordFile(tmp_path / "a.jsonl", "a")], 100_000, 0, bad))
    assert bad.counts["invalid_utf8"] > 10 and bad.counts["wrong_type"] > 10
    assert "at byte" in bad.examples[0].message and len(texts) > 100
    with pytest.raises(UserError, match="at byte"):
        list(sample_texts([RecordFile(tmp_path / "a.jsonl", "a")], 100_000, 0, BadRecords(strict=True)))


def test_other_files_say_so_or_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"a\.parquet: not readable as Parquet"):
        drawn([RecordFile(tmp_path / "a.parquet", "a")], 10)
    with pytest.raises(UserError, match="no such file"):
        drawn([RecordFile(tmp_path / "gone.jsonl", "gone")], 10)
    (tmp_path / "empty.jsonl").touch()
    assert drawn([RecordFile(tmp_path / "empty.jsonl", "empty")], 10) == []
    pq.write_table(pa.table({"condition": [1] * 9000, "instruction": ["x" * 9] * 9000, "response": ["y"] * 9000}),
                   tmp_path / "b.parquet")  # fmt: skip
    bad = BadRecords()
    for budget in (10, 10**9):
        assert list(sample_texts([RecordFile(tmp_path / "b.parquet", "b")], budget, 0, bad)) == []
    assert bad.counts == {"wrong_type": 2}


@given(st.text(st.sampled_from("ab \n"), max_size=60), st.integers(1, 12))
def test_pieces_join_to_the_text_and_words_stay_whole_where_they_fit(text: str, most: int) -> None:
    pieces = list(cut(text, most))
    assert "".join(pieces) == text and all(0 < len(piece) <= most for piece in pieces)
    for left, right in pairwise(pieces):
        # Cut within a word only where the piece has no other place.
        assert right[0] in " \n" or not set(left[1:]) & set(" \n")
