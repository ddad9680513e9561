from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.contracts import UserError
from hrm_text.data.decks import permutation
from hrm_text.data.masks import folder_identity, write_masks
from hrm_text.data.mixture import as_text, mixture
from hrm_text.data.rules import Rule
from hrm_text.data.sample import preview_epochs, sample_epochs

SPANS = ("inst_start", "inst_len", "resp_start", "resp_len")
Lengths = list[tuple[int, int]]  # of the prefix and the response of each row


def write_store(store: Path, strata: dict[str, Lengths], vocab_size: int = 1000) -> dict[str, list[int]]:
    """A store in the published layout, without any key of ours; returns the tokens of each stratum."""
    store.mkdir(parents=True)
    info = {
        "tokenizer_path": "t",
        "boq": "a",
        "eoq": "b",
        "eoa": "c",
        "condition_mapping": {},
        "vocab_size": vocab_size,
    }
    (store / "tokenizer_info.json").write_text(json.dumps(info))
    tokens_of = {}
    for number, (name, lengths) in enumerate(strata.items()):
        (store / name).mkdir()
        pieces = np.array(lengths, np.uint64).reshape(-1)
        ends = np.cumsum(pieces, dtype=np.uint64)
        tokens = (np.arange(int(pieces.sum())) * 7 + number * 131) % vocab_size
        tokens_of[name] = tokens.tolist()
        np.save(store / name / "tokens.npy", tokens.astype(np.uint32))
        starts = ends - pieces
        for span, column in zip(SPANS, (starts[::2], pieces[::2], starts[1::2], pieces[1::2]), strict=True):
            np.save(store / name / f"{span}.npy", column)
        (store / name / "metadata.json").write_text('{"source_mtime": 0, "source_size": 0}')
    return tokens_of


def brute_force(
    strata: dict[str, Lengths], rules: list[Rule], epochs: int, seed: int, max_seq_len: int, min_resp_len: int
) -> list[list[tuple[int, int, int, int]]]:
    """The epochs as the specification words them, row by row: (inst_start, inst_len, resp_start, resp_len)."""
    rng = np.random.Generator(np.random.Philox(seed=seed))
    usable: dict[str, list[tuple[int, int, int, int]]] = {}
    position = 0
    for name in sorted(strata):
        usable[name] = []
        long_context = next((rule.long_context for rule in rules if name.startswith(rule.prefix)), "truncate")
        for inst_len, resp_len in strata[name]:
            inst_start, resp_start = position, position + inst_len
            position += inst_len + resp_len
            allowed = max_seq_len - min(inst_len, max_seq_len)
            if resp_len < min_resp_len:
                continue
            if long_context == "drop" and resp_len > allowed:
                continue
            if long_context == "truncate" and allowed < 1:
                continue
            usable[name].append((inst_start, inst_len, resp_start, min(resp_len, allowed)))
    decks: dict[str, list[int]] = {name: [] for name in strata}
    result = []
    for _ in range(epochs):
        epoch = []
        for name in sorted(strata):
            rule = next((rule for rule in rules if name.startswith(rule.prefix)), Rule(prefix=""))
            rows = len(usable[name])
            for _ in range((rows if rule.max_per_file is None else min(rows, rule.max_per_file)) * rule.repeat):
                if not decks[name]:
                    decks[name] = rng.permutation(rows).tolist()
                epoch.append(usable[name][decks[name].pop(0)])
        result.append([epoch[index] for index in rng.permutation(len(epoch))])
    return result


def epoch_rows(sampled: Path, epoch: int) -> list[tuple[int, ...]]:
    columns = [np.load(sampled / f"epoch_{epoch}" / f"{span}.npy") for span in SPANS]
    assert {column.dtype for column in columns} == {np.dtype(np.int64)}
    return list(zip(*(column.tolist() for column in columns), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


lengths = st.lists(st.tuples(st.integers(1, 14), st.integers(0, 14)), max_size=9)
names = st.sampled_from(["a__1.jsonl", "a__2.parquet", "ab.jsonl", "b__1.jsonl", "c.jsonl"])
a_rule = st.builds(
    Rule,
    prefix=st.sampled_from(["a", "a__", "a__1.jsonl", "b", "", "nothing"]),
    max_per_file=st.none() | st.integers(0, 6),
    repeat=st.integers(1, 5),
    long_context=st.sampled_from(["truncate", "drop"]),
)


@given(
    strata=st.dictionaries(names, lengths, min_size=1, max_size=4),
    rules=st.lists(a_rule, max_size=4),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**63),
    min_resp_len=st.integers(1, 3),
)
def test_epochs_are_those_of_the_specification(
    tmp_path_factory: pytest.TempPathFactory,
    strata: dict[str, Lengths],
    rules: list[Rule],
    epochs: int,
    seed: int,
    min_resp_len: int,
) -> None:
    folder = tmp_path_factory.mktemp("sample")
    tokens_of = write_store(folder / "store", strata)
    expected = brute_force(strata, rules, epochs, seed, 12, min_resp_len)

    def sample() -> Any:
        return sample_epochs(folder / "store", folder / "out", rules, epochs, seed, 12, min_resp_len)

    if not expected[0]:
        with pytest.raises(UserError, match=r"no row to draw|holds no token"):
            sample()
        return
    summary = sample()
    assert [epoch_rows(folder / "out", epoch) for epoch in range(epochs)] == expected
    tokens = np.load(folder / "out/tokens.npy")
    assert tokens.tolist() == [token for name in sorted(strata) for token in tokens_of[name]]
    per_epoch = [sum(row[1] + row[3] for row in epoch) for epoch in expected]
    assert summary.tokens_per_epoch == per_epoch
    metadata = json.loads((folder / "out/metadata.json").read_text())
    assert metadata == {
        "tokenizer_info": json.loads((folder / "store/tokenizer_info.json").read_text()),
        "vocab_size": None,
        "max_seq_len": 12,
        "total_length": round(sum(per_epoch) / epochs),
    }
    # Every row of the store is in use or counted as lost.
    assert [stratum.name for stratum in summary.strata] == sorted(strata)
    for stratum in summary.strata:
        assert stratum.rows == len(strata[stratum.name])
        assert stratum.rows == stratum.usable + stratum.short_response + stratum.too_long
    assert sum(stratum.drawn_rows for stratum in summary.strata) == sum(map(len, expected))
    assert sum(stratum.drawn_tokens for stratum in summary.strata) == sum(per_epoch)


ROWS: Lengths = [(3, 4)] * 5


def test_a_small_worked_example(tmp_path: Path) -> None:
    # Written out by hand, so that the brute force above has a witness.
    write_store(tmp_path / "store", {"a.jsonl": [(2, 3), (2, 1), (9, 5), (10, 2)]})
    summary = sample_epochs(tmp_path / "store", tmp_path / "out", [], 1, seed=0, max_seq_len=10)
    # The second has too short a response, the third is cut from 5 to 1, the fourth has no room.
    assert sorted(epoch_rows(tmp_path / "out", 0)) == [(0, 2, 2, 3), (8, 9, 17, 1)]
    (stratum,) = summary.strata
    assert (stratum.usable, stratum.short_response, stratum.too_long, stratum.truncated) == (2, 1, 1, 1)
    dropped = sample_epochs(tmp_path / "store", tmp_path / "out", [Rule(prefix="", long_context="drop")], 1, 0, 10)
    assert epoch_rows(tmp_path / "out", 0) == [(0, 2, 2, 3)]
    assert (dropped.strata[0].too_long, dropped.strata[0].truncated) == (2, 0)


def test_epochs_go_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.jsonl": ROWS})
    sample_epochs(tmp_path / "store", tmp_path / "out", [Rule(prefix="a", max_per_file=2)], 5, seed=3)
    drawn = [row for epoch in range(5) for row in epoch_rows(tmp_path / "out", epoch)]
    # Ten draws go through the deck of five exactly twice; within the first two epochs nothing comes twice.
    assert sorted(drawn) == sorted(2 * [(7 * row, 3, 7 * row + 3, 4) for row in range(5)])
    assert len(set(drawn[:4])) == 4


def test_a_repeat_beyond_the_rows_takes_each_equally_often(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.jsonl": ROWS})
    sample_epochs(tmp_path / "store", tmp_path / "out", [Rule(prefix="", repeat=7)], 1)
    rows = epoch_rows(tmp_path / "out", 0)
    assert len(rows) == 35
    assert {rows.count(row) for row in set(rows)} == {7}


def test_the_first_rule_that_matches_wins_and_idle_rules_are_named(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a__x.jsonl": ROWS, "b.jsonl": ROWS})
    rules = [
        Rule(prefix="a__", max_per_file=1),
        Rule(prefix="a__x", repeat=9),
        Rule(prefix="typo", max_per_file=3),
        Rule(prefix="b", max_per_file=0),
    ]
    summary = sample_epochs(tmp_path / "store", tmp_path / "out", rules, 2)
    assert [(stratum.rule, stratum.drawn_rows) for stratum in summary.strata] == [("a__", 2), ("b", 0)]
    assert summary.unused_rules == ["a__x", "typo"]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.jsonl": ROWS * 4, "b.jsonl": ROWS})
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        sample_epochs(tmp_path / "store", tmp_path / name, [Rule(prefix="a", max_per_file=7)], 3, seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    changed = {name for name, data in contents(tmp_path / "one").items() if contents(tmp_path / "three")[name] != data}
    assert {f"epoch_{epoch}/inst_start.npy" for epoch in range(3)} <= changed
    assert "tokens.npy" not in changed


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.int32)],
)
def test_tokens_are_of_the_smallest_type_that_holds_the_vocabulary(
    tmp_path: Path, vocab_size: int, dtype: type
) -> None:
    tokens = write_store(tmp_path / "store", {"a.jsonl": [(vocab_size, 3)]}, vocab_size)
    sample_epochs(tmp_path / "store", tmp_path / "out", [], 1, max_seq_len=10**6)
    found = np.load(tmp_path / "out/tokens.npy")
    assert found.dtype == dtype
    assert found.tolist() == tokens["a.jsonl"]


def test_tokens_are_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = write_store(tmp_path / "store", {"a.jsonl": ROWS, "b.jsonl": ROWS})
    monkeypatch.setattr("hrm_text.data.sample._COPY_TOKENS", 8)
    sample_epochs(tmp_path / "store", tmp_path / "out", [], 1)
    assert np.load(tmp_path / "out/tokens.npy").tolist() == tokens["a.jsonl"] + tokens["b.jsonl"]


def test_a_store_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    def refused(store: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            sample_epochs(tmp_path / store, tmp_path / "out", [], 1)
        assert not (tmp_path / "out").exists()

    refused("absent", "not a finished token store")
    for store in ("unfinished", "id", "span", "rows", "mixed", "missing"):
        write_store(tmp_path / store, {"a.jsonl": ROWS, "b.jsonl": ROWS})
    (tmp_path / "unfinished/tokenizer_info.json").unlink()
    refused("unfinished", "not a finished token store")
    np.save(tmp_path / "id/b.jsonl/tokens.npy", np.full(35, 1000, np.uint32))
    refused("id", r"b\.jsonl/tokens\.npy: token id 1000 is outside the vocabulary of 1,000")
    np.save(tmp_path / "span/b.jsonl/resp_len.npy", np.array([4, 4, 4, 4, 5], np.uint64))
    refused("span", "outside of tokens")
    np.save(tmp_path / "rows/b.jsonl/resp_len.npy", np.array([4, 4], np.uint64))
    refused("rows", "differ in length")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "mixed" / name / "metadata.json").write_text(json.dumps({"tokenizer_sha256": name}))
    refused("mixed", "different tokenizers")
    (tmp_path / "missing/a.jsonl/inst_len.npy").unlink()
    refused("missing", r"inst_len\.npy")


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.jsonl": ROWS})
    for name, value in (("epochs", 0), ("max_seq_len", 1), ("min_resp_len", 0)):
        options: dict[str, Any] = {"epochs": 1, name: value}
        with pytest.raises(UserError, match=f"{name} is {value}, expected at least"):
            sample_epochs(tmp_path / "store", tmp_path / "out", [], **options)


def test_only_a_sampled_folder_is_replaced(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.jsonl": ROWS})
    sample_epochs(tmp_path / "store", tmp_path / "out", [], 3)
    sample_epochs(tmp_path / "store", tmp_path / "out", [], 1)
    assert not (tmp_path / "out/epoch_1").exists()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="no row to draw"):
        sample_epochs(tmp_path / "store", tmp_path / "out", [Rule(prefix="", max_per_file=0)], 1)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex"):
        sample_epochs(tmp_path / "store", tmp_path / "out", [], 1)
    with pytest.raises(UserError, match="not a sampled folder"):
        sample_epochs(tmp_path / "store", tmp_path / "store", [], 1)


def test_pieces_and_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    strata = {
        name: [(int(a), int(b)) for a, b in rng.integers(1, 14, (rows, 2))]
        for name, rows in (("a", 70), ("b", 33), ("c", 16))
    }
    write_store(tmp_path / "store", strata)
    rules = [Rule(prefix="a", max_per_file=29), Rule(prefix="b", repeat=3)]
    sample_epochs(tmp_path / "store", tmp_path / "whole", rules, 3, 1, 12)
    monkeypatch.setattr("hrm_text.data.decks.PIECE_ROWS", 10)
    monkeypatch.setattr("hrm_text.data.decks.CHUNK_ROWS", 8)
    sample_epochs(tmp_path / "store", tmp_path / "pieces", rules, 3, 1, 12)
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


@given(length=st.integers(0, 3000), seed=st.integers(0, 2**63))
def test_a_permutation_in_a_smaller_type_is_the_same_one(length: int, seed: int) -> None:
    ours, theirs = (np.random.Generator(np.random.Philox(seed=seed)) for _ in range(2))
    assert permutation(length, ours).tolist() == theirs.permutation(length).tolist()
    assert ours.random() == theirs.random()


def test_masked_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.jsonl": [(2, 3), (2, 1), (9, 5), (10, 2), (1, 4)], "b.jsonl": ROWS})
    marked = {"a.jsonl": ([0, 1], [1, 3]), "b.jsonl": ([], [])}
    for number, masks in enumerate(("one", "two")):
        with write_masks(tmp_path / masks) as writer:
            for name, rows in marked.items():
                mask = np.zeros(5, np.bool_)
                mask[rows[number]] = True
                writer.add(name, folder_identity(tmp_path / "store" / name), mask)
            writer.finish("test", {}, {})
    summary = sample_epochs(
        tmp_path / "store", tmp_path / "out", [], 1, max_seq_len=10, exclude=[tmp_path / "one", tmp_path / "two"]
    )
    a, b = summary.strata
    assert (a.excluded, a.short_response, a.too_long, a.usable, a.truncated) == (3, 0, 0, 2, 1)
    assert (b.excluded, b.usable) == (0, 5)
    assert sorted(row for row in epoch_rows(tmp_path / "out", 0) if row[0] < 39) == [(8, 9, 17, 1), (34, 1, 35, 4)]
    assert json.loads((tmp_path / "out/sampling.json").read_text())["exclude"] == [
        str(tmp_path / "one"),
        str(tmp_path / "two"),
    ]
    with pytest.raises(UserError, match="no folder of masks"):
        sample_epochs(tmp_path / "store", tmp_path / "out", [], 1, exclude=[tmp_path / "store"])


def test_files_of_a_rule_share_its_limit(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a1": ROWS * 4, "a2": ROWS * 2, "b": ROWS})
    summary = sample_epochs(tmp_path / "store", tmp_path / "out", [Rule(prefix="a", max_total=9, repeat=2)], 2)
    assert [stratum.drawn_rows for stratum in summary.strata] == [24, 12, 10]


@given(
    strata=st.dictionaries(names, lengths, min_size=1, max_size=4),
    rules=st.lists(a_rule, max_size=3),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**63),
)
def test_a_preview_counts_what_sampling_draws(
    tmp_path_factory: pytest.TempPathFactory,
    strata: dict[str, Lengths],
    rules: list[Rule],
    epochs: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("preview")
    write_store(folder / "store", strata)
    before = contents(folder)
    try:
        preview = preview_epochs(folder / "store", rules, epochs, seed, 12)
    except UserError as error:
        with pytest.raises(UserError, match=re.escape(str(error))):
            sample_epochs(folder / "store", folder / "out", rules, epochs, seed, 12)
        return
    assert contents(folder) == before
    assert preview == sample_epochs(folder / "store", folder / "out", rules, epochs, seed, 12)

    *by_rule, total = mixture(preview)
    rows = [row for epoch in range(epochs) for row in epoch_rows(folder / "out", epoch)]
    assert total.drawn * epochs == pytest.approx(len(rows))
    assert total.drawn_tokens == sum(row[1] + row[3] for row in rows)
    assert total.unique_tokens == sum(row[1] + row[3] for row in set(rows))
    assert sum(row.share for row in by_rule) == pytest.approx(1)
    assert sum(row.files for row in by_rule) == total.files == len(strata)
    assert total.rows - total.excluded - total.short - total.long == sum(s.usable for s in preview.strata)
    assert len({len(line) for line in as_text([*by_rule, total]).splitlines()}) == 1


def test_progress_counts_passes_over_strata(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.jsonl": ROWS, "b.jsonl": ROWS})
    calls: list[tuple[int, int]] = []
    sample_epochs(tmp_path / "store", tmp_path / "out", [], 3, on_progress=lambda *call: calls.append(call))
    assert calls == [(done, 8) for done in range(1, 9)]
