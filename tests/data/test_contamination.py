from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import Example, UserError
from hrm_text.data import contamination, ngrams, shards
from hrm_text.data.contamination import ContaminationReport, find_contamination
from hrm_text.data.engine import Engine
from hrm_text.data.masks import read_mask
from hrm_text.data.ngrams import Matches, build_ngrams
from hrm_text.data.pack import EpochIndex
from hrm_text.data.records import write_jsonl
from hrm_text.data.tokenize import SPANS, tokenize_files
from hrm_text.data.tokenizer import load_tokenizer, train_tokenizer

RNG = np.random.default_rng()
WORDS = "What is the sum of answer word reverse and a hello school naïve café 東京 12 30 42 7".split()

Case = tuple[Path, Path, dict[str, list[tuple[str, ...]]]]


def some_words(count: int) -> str:
    return " ".join(RNG.choice(WORDS, count))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 23)
    monkeypatch.setattr(contamination, "_SCAN_ROWS", 5)
    monkeypatch.setattr(ngrams, "_BUFFER_PAIRS", 1)  # as many as the longest record has tokens


class Oracle:
    """Sets of tuples."""

    def __init__(self, store: Path, tokenizer_dir: Path) -> None:
        self.records: dict[str, list[list[int]]] = {}
        self.tokenizer = load_tokenizer(tokenizer_dir)
        for folder in sorted(path for path in store.iterdir() if path.is_dir()):
            tokens = np.load(folder / "tokens.npy").tolist()
            columns = [np.load(folder / f"{name}.npy").tolist() for name in SPANS]
            spans = zip(*columns, strict=True)
            self.records[folder.name] = [tokens[a : a + b] + tokens[c : c + d] for a, b, c, d in spans]

    def grams(self, tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def coverage(self, pieces: Sequence[str], n: int) -> float:
        corpus = {gram for of_file in self.records.values() for record in of_file for gram in self.grams(record, n)}
        covered = total = 0
        for piece in pieces:
            ids = self.ids(piece)
            inside = [False] * len(ids)
            for start, gram in enumerate(self.grams(ids, n)):
                if gram in corpus:
                    inside[start : start + n] = [True] * n
            covered += sum(inside)
            total += len(ids)
        return covered / max(total, 1)

    def masks(self, pieces: Sequence[str], n: int, common: int) -> tuple[dict[str, list[bool]], int]:
        """Which rows are masked, and how many runs are too common."""
        wanted = {gram for piece in pieces for gram in self.grams(self.ids(piece), n)}
        stands_in: Counter[tuple[int, ...]] = Counter()
        for of_file in self.records.values():
            for record in of_file:
                stands_in.update(set(self.grams(record, n)) & wanted)
        wanted = {gram for gram in wanted if stands_in[gram] <= common}
        masks = {
            name: [bool(set(self.grams(record, n)) & wanted) for record in of_file]
            for name, of_file in self.records.items()
        }
        return masks, sum(count > common for count in stands_in.values())


@pytest.fixture
def case(tmp_path: Path, tokenizer_dir: Path) -> Case:
    """A store, a folder of benchmarks, and the pieces of each question; records quote questions in part or whole."""
    passages: list[tuple[str, ...]] = [(some_words(30), some_words(8)) for _ in range(10)]
    questions: dict[str, list[tuple[str, ...]]] = {
        "gsm8k": [(some_words(int(count)),) for count in RNG.integers(1, 40, 30)],
        "boolq": [*passages, ("", "")],
        "mine": [(some_words(25),) for _ in range(5)],
    }
    questions["mine"].append(questions["gsm8k"][0])
    sets = tmp_path / "sets"
    rows: dict[str, list[dict[str, str]]] = {
        "gsm8k/test.jsonl": [{"question": texts[0]} for texts in questions["gsm8k"]],
        "boolq/dev.jsonl": [{"passage": texts[0], "question": texts[1]} for texts in questions["boolq"]],
        "mine.jsonl": [{"text": texts[0]} for texts in questions["mine"]],
    }
    for file, of_file in rows.items():
        (sets / file).parent.mkdir(parents=True, exist_ok=True)
        (sets / file).write_text("".join(json.dumps(row) + "\n" for row in of_file))
    all_texts = [text for of in questions.values() for pieces in of for text in pieces if text]
    for name in "abc":
        examples = []
        for _ in range(25):
            quoted = all_texts[RNG.integers(len(all_texts))].split()
            first = RNG.integers(0, len(quoted))
            quote = " ".join(quoted[first : first + RNG.integers(1, 30)])
            sides = [some_words(5) + " " + quote + " " + some_words(3), some_words(20)]
            RNG.shuffle(sides)
            examples.append(Example("direct", sides[0], sides[1]))
        examples += [Example("direct", "Reverse: " + all_texts[0], "hello")] * (6 if name == "b" else 0)
        write_jsonl(tmp_path / "records" / f"{name}.jsonl", examples)
    tokenize_files([tmp_path / "records"], tokenizer_dir, tmp_path / "store")
    return tmp_path / "store", sets, questions


def coverage_of(out: Path) -> dict[tuple[str, int], dict[str, float]]:
    values = [json.loads(line) for line in (out / "coverage.jsonl").read_text().splitlines()]
    return {(value["benchmark"], value["index"]): value["coverage"] for value in values}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("common", [1, 4, 1000])
def test_coverage_and_masks_are_those_of_sets(tmp_path: Path, tokenizer_dir: Path, case: Case, common: int) -> None:
    store, sets, questions = case
    out = tmp_path / "masks"
    report = find_contamination(store, sets, out, Engine(), n=(7, 13, 20), mask_n=13, common=common)
    oracle = Oracle(store, tokenizer_dir)
    found = coverage_of(out)
    assert set(found) == {(name, index) for name, of in questions.items() for index in range(len(of))}
    for (name, index), of_n in found.items():
        for n in (7, 13, 20):
            assert of_n[str(n)] == pytest.approx(oracle.coverage(questions[name][index], n)), (name, index, n)
    pieces = [text for of in questions.values() for texts in of for text in texts]
    masks, common_runs = oracle.masks(pieces, 13, common)
    for name, mask in masks.items():
        assert read_mask(out, store / name, len(mask)).tolist() == mask
    assert report.masked == sum(map(sum, masks.values()))
    assert report.common_runs == common_runs
    check_report(report, questions, found, oracle)


def check_report(
    report: ContaminationReport,
    questions: dict[str, list[tuple[str, ...]]],
    found: dict[tuple[str, int], dict[str, float]],
    oracle: Oracle,
) -> None:
    assert [(one.benchmark, one.n) for one in report.benchmarks] == [
        (name, n) for n in (7, 13, 20) for name in ("gsm8k", "boolq", "mine")
    ]
    for one in report.benchmarks:
        of = questions[one.benchmark]
        assert one.questions == len(of)
        longest = [max(len(oracle.ids(text)) for text in texts) for texts in of]
        assert one.too_short == sum(length < one.n for length in longest)
        values = [found[one.benchmark, index][str(one.n)] for index in range(len(of))]
        clean, not_clean, not_dirty, dirty = (part.questions for part in one.subsets)
        assert clean == sum(value < 0.2 for value in values)
        assert dirty == sum(value >= 0.8 for value in values)
        assert clean + not_clean == not_dirty + dirty == len(of)
        wanted = {gram for texts in of for text in texts for gram in oracle.grams(oracle.ids(text), one.n)}
        runs = {
            name: len(wanted & {gram for record in of_file for gram in oracle.grams(record, one.n)})
            for name, of_file in oracle.records.items()
        }
        ordered = sorted((-count, name) for name, count in runs.items() if count)
        assert one.sources == [{"source": name, "runs": -count} for count, name in ordered]


@given(st.data())
def test_runs_found_are_those_of_sets(data: st.DataObject) -> None:
    # Three different tokens: runs repeat, overlap themselves, and nearly match.
    token = st.integers(0, 2)
    pieces = data.draw(st.lists(st.lists(token, max_size=12), min_size=1, max_size=5))
    records = data.draw(st.lists(st.lists(token, max_size=30), min_size=1, max_size=5))
    n = data.draw(st.integers(1, 6))
    tokens = np.array(list(chain(*pieces)), np.uint32)
    starts = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
    table = build_ngrams(tokens, starts, n)
    runs = {tuple(piece[i : i + n]) for piece in pieces for i in range(len(piece) - n + 1)}
    assert len(table.start_of) == len(runs)
    by_number = [tuple(tokens[start : start + n].tolist()) for start in table.start_of.tolist()]
    assert set(by_number) == runs
    for number, piece in enumerate(pieces):
        for i in range(len(piece)):
            run = int(table.run_at[starts[number] + i])
            assert (run == -1) == (i + n > len(piece))
            assert run == -1 or by_number[run] == tuple(piece[i : i + n])

    lengths = np.array([len(record) for record in records], np.int64)
    ends = np.cumsum(lengths)
    half = lengths // 2
    spans = EpochIndex(ends - lengths, half, ends - lengths + half, lengths - half)
    matches = Matches([table], n, common=10)
    flat = np.array(list(chain(*records)), np.uint32)
    pairs = [pair for part in (spans[:2], spans[2:]) for array in matches.scan(flat, part) for pair in array.tolist()]
    wanted = [
        (number, gram)
        for number, record in enumerate(records)
        for gram in dict.fromkeys(tuple(record[i : i + n]) for i in range(len(record) - n + 1))
        if gram in runs
    ]
    assert [(number, by_number[run]) for number, run in pairs] == wanted
    assert {gram: int(count) for gram, count in zip(by_number, matches.records[0], strict=True) if count} == Counter(
        gram for _, gram in wanted
    )


def test_two_workers_give_the_bytes_of_one(tmp_path: Path, case: Case) -> None:
    store, sets, _ = case
    one = find_contamination(store, sets, tmp_path / "one", Engine(workers=1))
    two = find_contamination(store, sets, tmp_path / "two", Engine(workers=2))
    assert one == two
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not (tmp_path / "two.work").exists()


def test_a_run_that_was_killed_goes_on(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sets, _ = case
    find_contamination(store, sets, tmp_path / "whole", Engine())
    read: list[object] = []
    real = shards.read_rows

    def dies(run: shards.Run, after: int = 4) -> shards.Rows:
        if len(read) == after:
            raise KeyboardInterrupt
        read.append(run)
        return real(run)

    monkeypatch.setattr(contamination, "read_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        find_contamination(store, sets, tmp_path / "killed", Engine())
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(contamination, "read_rows", lambda run: dies(run, 1000))
    find_contamination(store, sets, tmp_path / "killed", Engine())
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    assert len(read) <= len(set(read)) + 2  # those of the shard that was under way


def test_scores_are_tested_without_reading_the_store_again(
    tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sets, questions = case
    before = find_contamination(store, sets, tmp_path / "masks", Engine())
    assert all(part.score is None for one in before.benchmarks for part in one.subsets)
    coverage = coverage_of(tmp_path / "masks")
    correct = [coverage["gsm8k", index]["13"] >= 0.8 for index in range(len(questions["gsm8k"]))]
    lines = [{"benchmark": "gsm8k", "index": index, "correct": bool(value)} for index, value in enumerate(correct)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(contamination, "read_rows", None)
    monkeypatch.setattr(contamination, "build_ngrams", None)
    after = find_contamination(store, sets, tmp_path / "masks", Engine(), scores=tmp_path / "scores.jsonl")
    for one in after.benchmarks:
        dirty = one.subsets[3]
        assert (dirty.score is not None) == (one.benchmark == "gsm8k" and dirty.questions > 0)
        if one.benchmark == "gsm8k" and one.n == 13 and dirty.questions and not all(correct):
            share = sum(correct) / len(correct)
            assert dirty.z == pytest.approx((1 - share) / ((share * (1 - share)) ** 0.5 / dirty.questions**0.5))
    flagged = [part["flagged"] for one in after.as_json()["benchmarks"] for part in one["subsets"]]
    assert flagged == [part.flagged for one in after.benchmarks for part in one.subsets]


def test_settings_and_tokenizers_that_do_not_fit(tmp_path: Path, tokenizer_dir: Path, case: Case) -> None:
    store, sets, _ = case
    out = tmp_path / "masks"
    with pytest.raises(UserError, match="n: expected lengths from 1 to 63 tokens, found 13, 64"):
        find_contamination(store, sets, out, Engine(), n=(13, 64))
    with pytest.raises(UserError, match="mask_n is 13, expected one of n: 20"):
        find_contamination(store, sets, out, Engine(), n=(20,))
    with pytest.raises(UserError, match="common is 0"):
        find_contamination(store, sets, out, Engine(), common=0)
    other = train_tokenizer(iter(["something else " * 9]), 300, tmp_path / "other")
    with pytest.raises(UserError, match="is not the tokenizer that .* was made with"):
        find_contamination(store, sets, out, Engine(), tokenizer=other)
    info = json.loads((store / "tokenizer_info.json").read_text())
    (store / "tokenizer_info.json").write_text(json.dumps(info | {"tokenizer_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone, which cannot be read"):
        find_contamination(store, sets, out, Engine())
    shutil.copytree(tokenizer_dir, tmp_path / "moved")
    assert find_contamination(store, sets, out, Engine(), tokenizer=tmp_path / "moved").rows == 81
    del info["tokenizer_path"]
    (store / "tokenizer_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="does not say which tokenizer"):
        find_contamination(store, sets, out, Engine())
    with pytest.raises(UserError, match="is no folder of masks"):
        find_contamination(store, sets, store, Engine())
