from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm_text.contracts import UserError
from hrm_text.data import duplicates, shards
from hrm_text.data.duplicates import find_duplicates
from hrm_text.data.engine import Engine
from hrm_text.data.masks import read_mask
from hrm_text.data.minhash import Bands, Groups, hash_records
from hrm_text.data.pack import EpochIndex
from hrm_text.data.prompt import EncodedExamples
from hrm_text.data.shards import index_store, read_rows
from hrm_text.data.tokenize import StoreWriter
from hrm_text.files import write_json

RNG = np.random.default_rng()
Record = tuple[list[int], list[int]]
"""Prefix and response."""


def write_store(store: Path, files: Mapping[str, Sequence[Record]]) -> Path:
    for name, records in files.items():
        (store / name).mkdir(parents=True)
        with StoreWriter(store / name) as writer:
            for prefix, response in records:
                tokens = np.array(prefix + response, np.uint32)
                writer.append(EncodedExamples(tokens, np.array([len(prefix)]), np.array([len(response)])))
        write_json(store / name / "metadata.json", {"source_mtime": 0})
    write_json(store / "tokenizer_info.json", {"vocab_size": 65536})
    return store


def random_record(most: int = 12, vocab: int = 65536) -> Record:
    lengths = RNG.integers(1, most, 2)
    return RNG.integers(0, vocab, lengths[0]).tolist(), RNG.integers(0, vocab, lengths[1]).tolist()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several shards and partitions, files that are cut and files that share a shard.
    monkeypatch.setattr(shards, "SHARD_ROWS", 37)
    monkeypatch.setattr(duplicates, "_PARTITION_KEYS", 64)
    monkeypatch.setattr(duplicates, "_CHUNK_PAIRS", 5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def brute_force(files: Mapping[str, Sequence[Record]]) -> tuple[dict[str, list[bool]], int, int]:
    """The exact duplicates, and how many stay in the same and in another file."""
    first: dict[tuple[tuple[int, ...], ...], str] = {}
    masks: dict[str, list[bool]] = {}
    inside = across = 0
    for name in sorted(files):
        masks[name] = []
        for prefix, response in files[name]:
            key = (tuple(prefix), tuple(response))
            masks[name].append(key in first)
            if key in first:
                inside += first[key] == name
                across += first[key] != name
            first.setdefault(key, name)
    return masks, inside, across


@pytest.mark.parametrize("most", [3, 12])
def test_exact_duplicates_are_those_of_a_dictionary(tmp_path: Path, most: int) -> None:
    # Few different tokens in short records: many duplicates, and many that differ in one token or in the split alone.
    rows = {"c": 90, "a": 200, "b": 1, "d": 30}
    files: dict[str, list[Record]] = {}
    for name, count in rows.items():
        files[f"{name}.jsonl"] = [random_record(most, 3) for _ in range(count)]
    files["e.jsonl"] = []
    store = write_store(tmp_path / "store", files)
    report = find_duplicates(store, tmp_path / "masks", None, Engine())
    masks, inside, across = brute_force(files)
    for name, mask in masks.items():
        assert read_mask(tmp_path / "masks", store / name, len(mask)).tolist() == mask
    assert (report.exact_inside, report.exact_across, report.near_inside, report.near_across) == (inside, across, 0, 0)
    assert report.rows == 321
    assert sum(pair["rows"] for pair in report.sources) == report.masked == inside + across
    for example in report.examples:
        (kept, kept_row), (left_out, row) = example["kept"], example["left_out"]
        assert files[kept][kept_row] == files[left_out][row]
        assert (kept, kept_row) < (left_out, row)
        assert not masks[kept][kept_row]
    assert not (tmp_path / "masks.work").exists()


def shingles(record: Record) -> set[tuple[int, ...]]:
    tokens = record[0] + record[1]
    return {tuple(tokens[i : i + 5]) for i in range(max(1, len(tokens) - 4))}


def jaccard(a: Record, b: Record) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def pair_of(similarity: float, shingle_count: int = 400) -> tuple[Record, Record]:
    """Two records whose first tokens are the same, so many that the similarity is as asked."""
    same = round(2 * similarity / (1 + similarity) * shingle_count)
    tokens = RNG.integers(0, 65536, (3, shingle_count + 4))
    one, two = tokens[0], np.concatenate((tokens[0][: same + 4], tokens[1][same + 4 :]))
    return (one[:50].tolist(), one[50:].tolist()), (two[:50].tolist(), two[50:].tolist())


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.95])
def test_near_duplicates_are_found_as_often_as_the_curve_says(similarity: float) -> None:
    bands, count = Bands(), 600
    pairs = [pair_of(similarity) for _ in range(count)]
    assert jaccard(*pairs[0]) == pytest.approx(similarity, abs=0.01)
    records = [record for pair in pairs for record in pair]
    found = hash_all(records, bands)
    shared = (found[0::2] == found[1::2]).any(axis=1).mean()
    chance = bands.chance(similarity)
    # Five standard deviations of the count, and 0.01 for the similarity that is not met exactly.
    slack = 0.02 + 5 * (chance * (1 - chance) / count) ** 0.5
    assert abs(shared - chance) < slack


def hash_all(records: Sequence[Record], bands: Bands | None) -> np.ndarray:
    lengths = np.array([[len(piece) for piece in record] for record in records], np.int64)
    ends = np.cumsum(lengths.reshape(-1)).reshape(-1, 2)
    starts = ends - lengths
    tokens = np.array([token for record in records for piece in record for token in piece], np.uint32)
    spans = EpochIndex(starts[:, 0].copy(), lengths[:, 0].copy(), starts[:, 1].copy(), lengths[:, 1].copy())
    hashes = hash_records(tokens, spans, bands)
    return hashes.bands if bands else hashes.whole


def test_minhash_values_agree_as_often_as_shingles_are_shared() -> None:
    # Bands of one value: the share of equal ones estimates the similarity.
    bands = Bands(bands=64, rows=1)
    for similarity in (0.1, 0.5, 0.9):
        pairs = [pair_of(similarity) for _ in range(100)]
        found = hash_all([record for pair in pairs for record in pair], bands)
        assert (found[0::2] == found[1::2]).mean() == pytest.approx(similarity, abs=0.04)


def test_a_hash_depends_on_every_token_and_on_the_split() -> None:
    prefix, response = RNG.integers(0, 65536, 8).tolist(), RNG.integers(0, 65536, 9).tolist()
    variants: list[Record] = [(prefix, response), (prefix + response[:1], response[1:])]
    tokens = prefix + response
    for place in range(len(tokens)):
        changed = [*tokens[:place], (tokens[place] + 1) % 65536, *tokens[place + 1 :]]
        variants.append((changed[:8], changed[8:]))
    found = hash_all(variants, None)
    assert len(np.unique(found[:, 0])) == len(np.unique(found[:, 1])) == len(variants)


def test_near_duplicates_are_masked_inside_and_across_files(tmp_path: Path) -> None:
    unrelated = [random_record(200) for _ in range(60)]
    one, two = pair_of(0.97)
    three = (two[0], [*two[1][:-2], 1, 2])
    files = {"a.jsonl": [*unrelated[:30], one, one], "b.jsonl": [two, *unrelated[30:], three]}
    store = write_store(tmp_path / "store", files)
    report = find_duplicates(store, tmp_path / "masks", Bands(), Engine())
    assert np.flatnonzero(read_mask(tmp_path / "masks", store / "a.jsonl", 32)).tolist() == [31]
    assert np.flatnonzero(read_mask(tmp_path / "masks", store / "b.jsonl", 32)).tolist() == [0, 31]
    assert (report.exact_inside, report.exact_across, report.near_inside, report.near_across) == (1, 0, 0, 2)
    assert report.sources == [
        {"kept": "a.jsonl", "left_out": "b.jsonl", "rows": 2},
        {"kept": "a.jsonl", "left_out": "a.jsonl", "rows": 1},
    ]
    assert report.examples == [
        {"kind": "exact", "kept": ["a.jsonl", 30], "left_out": ["a.jsonl", 31]},
        {"kind": "near", "kept": ["a.jsonl", 30], "left_out": ["b.jsonl", 0]},
        {"kind": "near", "kept": ["a.jsonl", 30], "left_out": ["b.jsonl", 31]},
    ]


def test_groups_are_those_of_a_search_through_the_pairs() -> None:
    pairs = RNG.integers(0, 300, (180, 2)).astype(np.uint32)
    neighbours: dict[int, set[int]] = {number: {number} for number in range(300)}
    for a, b in pairs.tolist():
        neighbours[a].add(b)
        neighbours[b].add(a)
    wanted = {}
    for number in range(300):
        reached, left = {number}, [number]
        while left:
            new = neighbours[left.pop()] - reached
            reached |= new
            left += new
        wanted[number] = min(reached)
    groups = Groups(300)
    for chunk in np.array_split(pairs, 7):
        groups.join(chunk)
    assert groups.firsts().tolist() == list(wanted.values())


def corpus() -> dict[str, list[Record]]:
    records = [random_record(60) for _ in range(60)]
    records += [(prefix, [*response, 7]) for prefix, response in records] + records[::3]
    order = RNG.permutation(len(records))
    parts = np.array_split(order, 3)
    return {f"{name}.jsonl": [records[i] for i in part] for name, part in zip("abc", parts, strict=True)}


def test_two_workers_give_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_PARTITION_KEYS", 1000)
    store = write_store(tmp_path / "store", corpus())
    find_duplicates(store, tmp_path / "one", Bands(), Engine(workers=1))
    find_duplicates(store, tmp_path / "two", Bands(), Engine(workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "mask.json").read_text())["report"]["exact_across"] > 0


def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "store", corpus())
    find_duplicates(store, tmp_path / "whole", Bands(), Engine())
    hashed: list[int] = []
    real = hash_records

    def dies(*arguments: Any, after: int) -> Any:
        if len(hashed) == after:
            raise KeyboardInterrupt
        hashed.append(1)
        return real(*arguments)

    monkeypatch.setattr(duplicates, "hash_records", lambda *arguments: dies(*arguments, after=3))
    with pytest.raises(KeyboardInterrupt):
        find_duplicates(store, tmp_path / "killed", Bands(), Engine())
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(duplicates, "hash_records", lambda *arguments: dies(*arguments, after=1000))
    monkeypatch.setattr(duplicates, "_write_masks", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        find_duplicates(store, tmp_path / "killed", Bands(), Engine())
    monkeypatch.undo()
    monkeypatch.setattr(shards, "SHARD_ROWS", 37)
    monkeypatch.setattr(duplicates, "_PARTITION_KEYS", 64)
    monkeypatch.setattr(duplicates, "hash_records", lambda *arguments: dies(*arguments, after=0))
    runs = sum(len(shard.runs) for shard in index_store(store, 37).shards)
    find_duplicates(store, tmp_path / "killed", Bands(), Engine())  # nothing is hashed again
    # At most the runs of the shard that was under way were hashed twice.
    assert runs <= len(hashed) < runs + 3
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_finished_masks_are_kept_and_a_changed_store_is_looked_at_again(tmp_path: Path) -> None:
    files = corpus()
    store = write_store(tmp_path / "store", files)
    first = find_duplicates(store, tmp_path / "masks", Bands(), Engine())
    stamp = os.stat(tmp_path / "masks" / "mask.json").st_mtime_ns
    assert find_duplicates(store, tmp_path / "masks", Bands(), Engine()) == first
    assert os.stat(tmp_path / "masks" / "mask.json").st_mtime_ns == stamp
    without_near = find_duplicates(store, tmp_path / "masks", None, Engine())
    assert without_near.masked < first.masked
    write_store(store, {"d.jsonl": files["a.jsonl"]})
    assert find_duplicates(store, tmp_path / "masks", None, Engine()).exact_across > without_near.exact_across


def test_progress_reaches_the_total_and_never_falls(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    store = write_store(tmp_path / "store", corpus())
    find_duplicates(store, tmp_path / "masks", Bands(), Engine(), on_progress=lambda *at: seen.append(at))
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert len({total for _, total in seen}) == 1
    assert done[-1] == seen[-1][1]


def test_shards_hold_every_row_once(tmp_path: Path) -> None:
    files = {f"{i:02}.jsonl": [random_record()] * int(rows) for i, rows in enumerate(RNG.integers(0, 90, 20))}
    files["zz.jsonl"] = [random_record()]
    store = write_store(tmp_path / "store", files)
    index = index_store(store, 37, 500)
    place = 0
    rows = []
    for number, shard in enumerate(index.shards):
        assert (shard.number, shard.first_row) == (number, place)
        assert 0 < sum(run.last - run.first for run in shard.runs) <= 37
        assert shard.tokens <= 500
        for run in shard.runs:
            rows += [(run.folder.name, row) for row in range(run.first, run.last)]
            place += run.last - run.first
            assert index.folders[run.source] == run.folder
    assert rows == [(name, row) for name in sorted(files) for row in range(len(files[name]))]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished token store"):
        index_store(tmp_path)
    with pytest.raises(UserError, match="holds no record"):
        index_store(write_store(tmp_path / "empty", {"a.jsonl": []}))
    store = write_store(tmp_path / "store", corpus())
    np.save(store / "a.jsonl" / "resp_len.npy", np.load(store / "a.jsonl" / "resp_len.npy") + np.uint64(9))
    run = index_store(store).shards[0].runs[0]
    with pytest.raises(UserError, match="points outside of tokens.npy"):
        read_rows(run)
    np.save(store / "a.jsonl" / "resp_len.npy", np.zeros(3, np.uint64))
    with pytest.raises(UserError, match="differ in length"):
        read_rows(run)
    for name, checksum in (("a.jsonl", "1"), ("b.jsonl", "2")):
        write_json(store / name / "metadata.json", {"tokenizer_sha256": checksum})
    with pytest.raises(UserError, match="2 different tokenizers"):
        find_duplicates(store, tmp_path / "masks", None, Engine())
    (tmp_path / "masks.work").mkdir()
    write_json(store / "a.jsonl" / "metadata.json", {})
    with pytest.raises(UserError, match="is in the way"):
        find_duplicates(store, tmp_path / "masks", None, Engine())
