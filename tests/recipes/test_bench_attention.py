from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, PlainAttention, Spans, prefix_mask
from hrm_text.recipes import bench_attention as bench
from hrm_text.recipes.bench_attention import bench_attention, show, visible_pairs

CPU = torch.device("cpu")


def test_visible_pairs_are_those_of_the_mask() -> None:
    lengths, prefixes = torch.tensor([9, 5, 1, 7, 0]), torch.tensor([4, 5, 0, 0, 0])
    spans = Spans.of_samples(lengths, prefixes)
    assert visible_pairs(spans) == int(prefix_mask(spans.starts, prefixes, 24).sum())


def test_rows_for_every_combination_and_the_fastest_stands_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHECKED_TOKENS", 64)
    seen: list[tuple[int, int]] = []
    timings = bench_attention(
        ["plain", "grouped"],
        ["anchor", "short"],
        num_tokens=256,
        heads=2,
        head_dim=16,
        device=CPU,
        steps=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert [(row.distribution, row.backend) for row in timings] == [
        ("anchor", "plain"), ("anchor", "grouped"), ("short", "plain"), ("short", "grouped"),
    ]  # fmt: skip
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    for row in timings:
        assert row.relative_error < 1e-5 and row.peak_mib is None
        assert row.forward_ms > 0 and row.backward_ms > 0
        assert row.forward_tflops == pytest.approx(4 * 16 * 2 * row.visible_pairs / row.forward_ms * 1e-9)
    out = io.StringIO()
    show(timings, Console(file=out, width=80))
    lines = [line for line in out.getvalue().splitlines() if "anchor" in line or "short" in line]
    fastest = [min(rows, key=lambda row: row.forward_ms + row.backward_ms) for rows in (timings[:2], timings[2:])]
    assert len(lines) == 2 and "…" not in out.getvalue()
    assert all(row.backend in line for row, line in zip(fastest, lines, strict=True))


def test_a_wrong_backend_would_show_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(spans: Spans, num_tokens: int, device: torch.device, backend: str) -> Attention:
        return PlainAttention(Spans(spans.starts, spans.prefix_lengths * 0), num_tokens, device)

    monkeypatch.setattr(bench, "packed_attention", causal)
    (row,) = bench_attention(["grouped"], ["short"], num_tokens=256, heads=1, head_dim=8, device=CPU, steps=1)
    assert row.relative_error > 0.05


def test_a_backend_that_cannot_run_is_refused_before_anything_is_timed() -> None:
    with pytest.raises(UserError, match="'flash' is not to be had here: it needs a GPU"):
        bench_attention(["grouped", "flash"], device=CPU)
    with pytest.raises(UserError, match="unknown distribution"):
        bench_attention(["grouped"], ["odd"], device=CPU)
