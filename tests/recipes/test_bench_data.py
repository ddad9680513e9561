from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hrm_text.contracts import UserError
from hrm_text.data.loader import Loader
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.recipes import bench_data as module
from hrm_text.recipes.bench_data import (
    TokenizeTiming,
    anchor_lengths,
    bench_data,
    bench_loader,
    generated_examples,
    show,
    write_sampled,
)
from hrm_text.recipes.synthetic import CONTEXT


def test_lengths_are_those_of_the_anchors() -> None:
    prefix, response = anchor_lengths(20_000, 0)
    assert prefix.min() == 8 and response.min() == 1
    assert (prefix + response).max() == CONTEXT
    assert np.log(np.median(prefix)) == pytest.approx(4.6, abs=0.05)
    assert np.log(np.median(response)) == pytest.approx(4.8, abs=0.05)
    again, other = anchor_lengths(20_000, 0), anchor_lengths(20_000, 1)
    assert np.array_equal(again[0], prefix) and not np.array_equal(other[0], prefix)


def test_examples_have_a_word_for_every_token_of_those_lengths() -> None:
    prefix, response = anchor_lengths(5, 3)
    examples = list(generated_examples(5, 3))
    assert [len(example.instruction.split()) for example in examples] == prefix.tolist()
    assert [len(example.response.split()) for example in examples] == response.tolist()


def test_the_sampled_folder_is_one_that_trains(tmp_path: Path) -> None:
    write_sampled(tmp_path / "sampled", 200, 0)
    prefix, response = anchor_lengths(200, 0)
    loader = Loader(tmp_path / "sampled", tokens_per_batch=CONTEXT)
    assert sum(step.tokens for step, _ in loader) == int((prefix + response - 1).sum())
    timing = bench_loader(tmp_path / "sampled", CONTEXT, 2, seconds=0)
    assert timing.workers == 2 and timing.batches > 0 and timing.tokens_per_second > 0


def test_everything_is_timed_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    # As without records, but with fewer.
    monkeypatch.setattr(module, "generated_examples", lambda count, seed: generated_examples(100, seed))
    monkeypatch.setattr(module, "TURNS", 2)
    timings = bench_data(samples=2_000, tokens_per_batch=CONTEXT, ranks=2, workers=(0,), seconds=0)
    assert timings.tokenize.tokens > 0 and timings.tokenize.share > 0
    assert set(timings.packing) == {"tokens", "balanced"}
    assert timings.packing["balanced"].full > 0.9
    out = io.StringIO()
    show(timings, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert f"{timings.loader[0].tokens_per_second:,.0f}" in out.getvalue()
    assert f"{100 * timings.tokenize.share:.0f} %" in out.getvalue()


def test_the_share_is_of_the_bare_rate() -> None:
    assert TokenizeTiming(bytes=1, tokens=1, bare_bytes_per_second=4.0, bytes_per_second=3.0).share == 0.75


def test_nothing_to_tokenise_is_an_error(tmp_path: Path) -> None:
    tokenizer_dir = train_tokenizer(iter(["some text"]), 400, tmp_path / "tokenizer")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no usable record"):
        bench_data([tmp_path / "empty.jsonl"], tokenizer_dir, samples=100)
