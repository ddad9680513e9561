from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import UserError
from hrm_text.data import corpus_stats as module
from hrm_text.data.corpus_stats import LengthCounts, SourceStats, corpus_stats, count_repeats, packing_stats
from hrm_text.data.left_out import read_cleaning, read_mask_stats
from hrm_text.data.pack import EpochIndex
from hrm_text.data.packing_plan import plan_epoch


def index_of(rows: list[int], lengths: dict[int, int]) -> EpochIndex:
    """An epoch of rows of a corpus whose row r has a prefix of 2 and a response of lengths[r] tokens."""
    starts = {row: sum(lengths[r] + 2 for r in range(row)) for row in lengths}
    inst = np.array([starts[row] for row in rows], np.int64)
    resp = np.array([lengths[row] for row in rows], np.int64)
    return EpochIndex(inst, np.full(len(rows), 2, np.int64), inst + 2, resp)


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), min_size=1, max_size=4), st.integers(1, 30), st.randoms())
def test_repeats_are_what_counting_one_by_one_gives(epochs: list[list[int]], range_rows: int, random: Any) -> None:
    lengths = {row: random.randint(1, 1_000_000) for row in range(10)}
    expected, seen = [], set()
    for rows in epochs:
        counts, here = [0, 0, 0], set()
        for row in rows:
            counts[2 if row in here else 1 if row in seen else 0] += lengths[row] + 2
            here.add(row)
        seen |= here
        expected.append(counts)
    indices = [index_of(rows, lengths) for rows in epochs]
    assert count_repeats(indices, range_rows=range_rows).tolist() == expected


@given(st.lists(st.integers(0, 300_000), max_size=50), st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_lengths_are_counted_exactly_and_summed_in_bins(lengths: list[int], share: float) -> None:
    counts = LengthCounts()
    for part in np.array_split(np.array(lengths, np.int64), 3):
        counts.add(part)
    assert (counts.samples, counts.tokens) == (len(lengths), sum(lengths))
    if lengths:
        cut = sorted(min(length, LengthCounts.LONGEST) for length in lengths)
        assert counts.quantile(share) == cut[max(int(np.ceil(share * len(cut) - 1e-9)) - 1, 0)]
    edges = np.array([0, 1, 10, 1000, 50_000])
    assert counts.in_bins(edges).tolist() == np.histogram([x for x in lengths if x < 50_000], edges)[0].tolist()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=200), st.integers(1, 4))
def test_fullness_is_that_of_the_batches(samples: list[tuple[int, int]], ranks: int) -> None:
    inst, resp = (np.array(column, np.int64) for column in zip(*samples, strict=True))
    index = EpochIndex(np.zeros_like(inst), inst, np.zeros_like(inst), resp)
    lengths = [prefix + max(response - 1, 0) for prefix, response in samples]
    found = packing_stats(index, 100, ranks)
    steps = list(plan_epoch(np.array(lengths), inst, 100, ranks))
    filled = [sum(lengths[i] for i in batch) / 100 for step in (steps[:-1] or steps) for batch in step]
    assert found.fullness == pytest.approx(sum(filled) / len(filled))
    assert found.least == pytest.approx(min(filled))
    assert found.steps == len(steps) and sum(found.fullness_counts) == len(filled)
    assert bool(found.measures) == (len(steps) > 1)
    if found.measures:
        assert found.measures["balanced"].full == pytest.approx(found.fullness)


def write_store(store: Path, files: dict[str, list[tuple[int, int]]]) -> None:
    for name, lengths in files.items():
        (store / name).mkdir(parents=True)
        for column, part in enumerate(("inst_len", "resp_len")):
            np.save(store / name / f"{part}.npy", np.array([pair[column] for pair in lengths], np.uint64))
    (store / "tokenizer_info.json").write_text("{}")


def test_a_store_is_counted_in_chunks_as_the_sampler_would_treat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    # Of a context of 9: fits, cut, no room, short, fits, no room and short.
    rows = [(3, 7), (3, 8), (10, 4), (3, 1), (9, 2), (12, 0)]
    write_store(tmp_path / "store", {"synth__a.parquet": rows, "own.jsonl": [(1, 2)]})
    (tmp_path / "store" / "own.jsonl" / "metadata.json").write_text('{"dropped": {"too_long": 3, "not_json": 0}}')
    seen: list[tuple[int, int]] = []
    stats = corpus_stats(tmp_path / "store", max_seq_len=10, on_progress=lambda *done: seen.append(done))
    assert stats.is_store and seen[-1] == (7, 7)
    own, synth = stats.sources
    assert (own.dataset, own.task, synth.dataset, synth.task) == ("own", "own", "synth", "a")
    expected = SourceStats("synth__a.parquet", rows=6, tokens=62, short_response=2, too_long=1, truncated=2, usable=3)
    assert synth == expected
    assert stats.tokenizing == {"too_long": 3}
    assert stats.prefix_lengths.tokens + stats.response_lengths.tokens == 62 + 3
    assert stats.groups["own"] == "own" and sum(len(sources) for sources in stats.by_group().values()) == 2


def test_damaged_folders_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a token store"):
        corpus_stats(tmp_path)
    write_store(tmp_path / "store", {"a.jsonl": [(1, 2)]})
    np.save(tmp_path / "store" / "a.jsonl" / "resp_len.npy", np.array([1, 2]))
    with pytest.raises(UserError, match=r"a\.jsonl: its index files differ"):
        corpus_stats(tmp_path / "store")
    np.save(tmp_path / "store" / "a.jsonl" / "resp_len.npy", np.array([-1]))
    with pytest.raises(UserError, match="below 0"):
        corpus_stats(tmp_path / "store")
    with pytest.raises(UserError, match="ranks: expected at least 1"):
        corpus_stats(tmp_path / "store", ranks=0)


def test_a_sampled_folder_need_not_be_ours(tmp_path: Path) -> None:
    """The published pipeline writes no sampling.json."""
    for number in range(2):
        (tmp_path / f"epoch_{number}").mkdir()
        index = index_of([0, 1, 1], {0: 3, 1: 18})
        for name in ("inst_start", "inst_len", "resp_start", "resp_len"):
            np.save(tmp_path / f"epoch_{number}" / f"{name}.npy", getattr(index, name).astype(np.int32))
    np.save(tmp_path / "tokens.npy", np.zeros(25, np.uint16))
    (tmp_path / "metadata.json").write_text('{"max_seq_len": 20, "tokenizer_info": {}}')
    stats = corpus_stats(tmp_path, tokens_per_batch=40, ranks=1)
    assert not stats.sources
    first, second = stats.epochs
    assert (first.first_tokens, first.earlier_tokens, first.again_tokens) == (25, 0, 20)
    assert (second.first_tokens, second.earlier_tokens, second.again_tokens) == (0, 25, 20)
    assert (first.samples, first.tokens, first.full) == (3, 45, 2)
    assert stats.packing is not None and stats.packing.steps == 2
    with pytest.raises(UserError, match="a micro-batch holds 10"):
        corpus_stats(tmp_path, tokens_per_batch=10)


def test_masks_are_added_up(tmp_path: Path) -> None:
    folders = {
        "a__x": {"identity": {"rows": 10}, "masked": 4},
        "b__y": {"identity": {"rows": 5}, "masked": 0},
    }
    manifest = {"kind": "duplicates", "settings": {"threshold": 0.8}, "folders": folders}
    (tmp_path / "mask.json").write_text(json.dumps(manifest))
    mask = read_mask_stats(tmp_path)
    assert (mask.kind, mask.rows, mask.masked, mask.by_source) == ("duplicates", 15, 4, {"a__x": (10, 4)})
    for damaged in ("[]", '{"folders": 3}', '{"folders": {"a": {"identity": {"rows": "x"}, "masked": 1}}}'):
        (tmp_path / "mask.json").write_text(damaged)
        with pytest.raises(UserError, match=r"mask\.json"):
            read_mask_stats(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_mask_stats(tmp_path / "absent")


def test_reports_of_cleaning_are_added_up_and_other_files_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "flan" / ".reports" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text('{"read": 10, "kept": 7, "dropped": {"no answer": 3}, "new key": 1}')
    (folder / "b.json").write_text('{"read": 2, "kept": 1, "dropped": {"no answer": 1, "odd": "x"}}')
    (folder / "c.json").write_text("{")
    (folder / "d.json").write_bytes(b'"\xff"')
    (tmp_path / "flan" / "e.json").write_text('{"read": 100, "kept": 1}')  # no report: it lies elsewhere
    found, unreadable = read_cleaning(tmp_path)
    assert unreadable == 2 and list(found) == ["flan"]
    assert (found["flan"].read, found["flan"].kept, found["flan"].dropped) == (12, 8, {"no answer": 4})
    with pytest.raises(UserError, match="no such folder"):
        read_cleaning(tmp_path / "absent")
