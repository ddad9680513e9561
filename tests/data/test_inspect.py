from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hrm_text.cli.data.look import show
from hrm_text.contracts import Example, UserError
from hrm_text.data.inspect import BOTH_WAYS, CAUSAL, UNSEEN, inspect_folder, mask_cells
from hrm_text.data.records import write_jsonl
from hrm_text.data.sample import sample_epochs
from hrm_text.data.tokenize import tokenize_files

PREFIX = "<|im_start|><|quad_end|><|object_ref_end|>What is {}?<|im_end|>"


@pytest.fixture
def store(tmp_path: Path, tokenizer_dir: Path) -> Path:
    for name, count in (("a", 3), ("b", 1)):
        examples = [Example("synth,cot", f"What is {name} {row}?", f"{row}") for row in range(count)]
        write_jsonl(tmp_path / "records" / f"{name}.jsonl", examples)
    tokenize_files([tmp_path / "records"], tokenizer_dir, tmp_path / "store")
    return tmp_path / "store"


def test_a_store_shows_samples_of_every_file_with_special_tokens(store: Path) -> None:
    shown = inspect_folder(store, 3)
    assert [(text.source, text.row) for text in shown] == [("a.jsonl", 0), ("a.jsonl", 1), ("b.jsonl", 0)]
    assert shown[1].prefix == PREFIX.format("a 1")
    assert shown[1].response == "1<|box_end|>"
    assert shown[1].response_tokens == 2
    assert PREFIX.format("a 1") in str(shown[1])
    assert len(inspect_folder(store, 100)) == 4


def test_a_sampled_folder_shows_its_first_epoch_in_order(store: Path, tmp_path: Path) -> None:
    sample_epochs(store, tmp_path / "sampled", [], 2)
    shown = inspect_folder(tmp_path / "sampled", 4)
    assert {text.source for text in shown} == {"epoch_0, a.jsonl,", "epoch_0, b.jsonl,"}
    assert [text.row for text in shown] == [0, 1, 2, 3]
    expected = {(PREFIX.format(f"a {row}"), f"{row}<|box_end|>") for row in range(3)}
    assert {(text.prefix, text.response) for text in shown} == expected | {(PREFIX.format("b 0"), "0<|box_end|>")}


def test_other_folders_and_lost_tokenizers_say_so(store: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match="expected a token store"):
        inspect_folder(tmp_path, 1)
    info = (store / "tokenizer_info.json").read_text()
    (store / "tokenizer_info.json").write_text(info.replace(str(tokenizer_dir.resolve()), "/moved/away"))
    with pytest.raises(UserError, match="made with the tokenizer /moved/away"):
        inspect_folder(store, 1)
    assert inspect_folder(store, 1, tokenizer_dir)[0].prefix == PREFIX.format("a 0")


def test_the_first_rows_are_spread_over_the_files_and_random_rows_over_all(tmp_path: Path, tokenizer_dir: Path) -> None:
    for number in range(10):
        rows = [Example("direct", f"{number}", "a b")] * (1 if number < 9 else 91)
        write_jsonl(tmp_path / "records" / f"file{number}.jsonl", rows)
    tokenize_files([tmp_path / "records"], tokenizer_dir, tmp_path / "store")
    assert [text.source for text in inspect_folder(tmp_path / "store", 2)] == ["file0.jsonl", "file5.jsonl"]

    drawn = inspect_folder(tmp_path / "store", 30, seed=1)
    assert drawn == inspect_folder(tmp_path / "store", 30, seed=1) != inspect_folder(tmp_path / "store", 30, seed=2)
    assert len({(text.source, text.row) for text in drawn}) == 30  # none twice
    # 91 of the 100 rows are in the last file; a draw by file would take 3 from it.
    assert sum(text.source == "file9.jsonl" for text in drawn) >= 20
    assert {text.row for text in inspect_folder(tmp_path / "store", 200, seed=3, source="file9")} == set(range(91))
    with pytest.raises(UserError, match=r"starts with 'nine'; there is file0\.jsonl"):
        inspect_folder(tmp_path / "store", 1, source="nine")


def test_a_sampled_folder_knows_sources_only_where_they_are_recorded(store: Path, tmp_path: Path) -> None:
    sampled = tmp_path / "sampled"
    sample_epochs(store, sampled, [], 1)
    recorded = json.loads((sampled / "sampling.json").read_text())
    first_of_b = len(np.load(store / "a.jsonl" / "tokens.npy"))
    for stratum, first in zip(recorded["strata"], (0, first_of_b), strict=True):
        stratum["first_token"] = first
    (sampled / "sampling.json").write_text(json.dumps(recorded))
    (only,) = inspect_folder(sampled, 5, source="b")
    assert only.prefix == PREFIX.format("b 0") and only.source == "epoch_0, b.jsonl,"
    assert {text.prefix for text in inspect_folder(sampled, 5, source="a", seed=0)} == {
        PREFIX.format(f"a {row}") for row in range(3)
    }
    (sampled / "sampling.json").unlink()
    with pytest.raises(UserError, match="does not record which source"):
        inspect_folder(sampled, 5, source="b")


def test_a_virtual_folder_shows_the_tokens_of_the_store(store: Path, tmp_path: Path) -> None:
    sample_epochs(store, tmp_path / "copied", [], 1)
    sample_epochs(store, tmp_path / "virtual", [], 1, virtual=True)
    copied, virtual = (inspect_folder(tmp_path / name, 9) for name in ("copied", "virtual"))
    assert [(text.prefix, text.response) for text in copied] == [(text.prefix, text.response) for text in virtual]
    (only,) = inspect_folder(tmp_path / "virtual", 9, source="b")
    assert only.source == "epoch_0, b.jsonl," and only.prefix == PREFIX.format("b 0")


def test_labels_positions_and_conditions_are_told(store: Path) -> None:
    first = inspect_folder(store, 1)[0]
    assert first.condition == "synth,cot"
    assert [piece.text for piece in first.prefix_pieces if piece.is_control] == [
        "<|im_start|>",
        "<|quad_end|>",
        "<|object_ref_end|>",
        "<|im_end|>",
    ]
    prefix = first.prefix_tokens
    assert first.input_tokens == prefix + 1
    # The last token of the prefix predicts the first of the response.
    assert f"response, 2 tokens at position {prefix}, labels of positions {prefix - 1} to {prefix}:" in str(first)


def test_text_cannot_harm_the_terminal_or_pass_for_a_control_token(tmp_path: Path, tokenizer_dir: Path) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 \r\x9b31m \u202egnp <|im_end|> [red]markup[/] \u2028"
    write_jsonl(tmp_path / "a.jsonl", [Example("direct", hostile, hostile + "x")])
    tokenize_files([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "store")
    samples = inspect_folder(tmp_path / "store", 1)
    for colours in (None, "truecolor"):
        out = io.StringIO()
        console = Console(file=out, force_terminal=colours is not None, color_system=colours, width=500)
        show(samples, console, mask=True)
        printed = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # the colours that we put in ourselves
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028]", printed)
        assert r"\x1b[2J\x1b]0;title\x07 \r\x9b31m \u202egnp \<|im_end|> [red]markup[/] \u2028" in printed
    forged = [piece for piece in samples[0].prefix_pieces if "im_end" in piece.text]
    assert [piece.is_control for piece in forged] == [False, True]
    assert re.search(r"\x1b\[[\d;]*31", out.getvalue()) is None  # no red: markup is text


def test_a_book_is_shown_by_its_ends(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [Example("direct", "start " + "1" * 100_000 + " end", "ok")])
    tokenize_files([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "store")
    (sample,) = inspect_folder(tmp_path / "store", 1)
    assert len(sample.prefix) < 1000 and sum(piece.num_tokens for piece in sample.prefix_pieces) == sample.prefix_tokens
    assert "start" in sample.prefix and "end<|im_end|>" in sample.prefix


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4), st.integers(1, 50))
def test_the_picture_of_a_mask_is_the_mask(samples: list[tuple[int, int]], size: int) -> None:
    lengths = [prefix + response for prefix, response in samples]
    prefixes = [prefix for prefix, _ in samples]
    cells = mask_cells(lengths, prefixes, size)
    owner = [(s, i) for s, length in enumerate(lengths) for i in range(length)]
    n, total = len(cells), len(owner)
    assert cells.shape == (n, n) and n <= size and (n == size or n % total == 0)
    for row, column in np.ndindex(n, n):
        (s, i), (t, j) = (owner[(2 * x + 1) * total // (2 * n)] for x in (row, column))
        both = s == t and i < prefixes[s] and j < prefixes[s]
        causal = s == t and not both and j <= i
        assert cells[row, column] == (BOTH_WAYS if both else CAUSAL if causal else UNSEEN)


def test_the_mask_has_two_forms(store: Path) -> None:
    def drawn(colours: Any) -> str:
        out = io.StringIO()
        show(inspect_folder(store, 2), Console(file=out, force_terminal=True, color_system=colours, width=80), True)
        return out.getvalue()

    plain, colourful = drawn(None), drawn("truecolor")
    assert "\x1b" not in plain and "##" in plain and "▀" not in plain
    assert "▀" in colourful and "##" not in colourful
    assert all(len(line) <= 80 for line in plain.splitlines())


def test_rows_that_point_outside_say_so(store: Path) -> None:
    starts = np.load(store / "a.jsonl" / "resp_start.npy")
    np.save(store / "a.jsonl" / "resp_start.npy", starts + np.uint64(1000))
    with pytest.raises(UserError, match=r"a\.jsonl row 0: points outside"):
        inspect_folder(store, 1)
