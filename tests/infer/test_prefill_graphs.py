"""Passes that are recorded equal those that are not: on a GPU, or kernel by kernel in Triton's interpreter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm_text.infer.prefill import Layout, NewTokens, prefill
from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.plan import Plan, plan
from hrm_text.model.recurrence import RecurrentLM, build

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.infer import prefill_graphs
from hrm_text.infer.prefill_graphs import GraphedPrefill, PaddedPass
from hrm_text.model.kernels.fused import fuse

# Tiles without a token, as the interpreter computes them; nothing of it is stored.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = ModelConfig(
    architecture="transformer",
    vocab_size=96,
    max_position_embeddings=64,
    hidden_size=24,
    num_layers=2,
    num_heads=2,
    head_dim=16,
    inner_multiple=8,
)
PAGE, PAGES = 4, 40
MOST_TEXTS = 4


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for a tile, be it empty."""
    monkeypatch.setattr(prefill_graphs, "MOST_TEXTS", MOST_TEXTS)


def models() -> tuple[RecurrentLM, RecurrentLM]:
    """(plain, fused) of the same weights."""
    plain = build(CONFIG, seed=1, device=DEVICE.type).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused, recompute="full")
    return plain, fused


def cache() -> PagedKeyValues:
    return PagedKeyValues.allocate(CONFIG, PAGES, PAGE, DEVICE, torch.float32)


def texts(lengths: Sequence[int], seed: int = 0) -> list[NewTokens]:
    """New texts, half of each prefix; the pages of all lie in disorder, and page 0 is nobody's."""
    rng = np.random.Generator(np.random.Philox(seed))
    pages = iter((1 + rng.permutation(PAGES - 1)).tolist())
    return [
        NewTokens(
            rng.integers(0, 96, length).tolist(),
            0,
            [(0, length // 2)] if length > 1 else [],
            [next(pages) for _ in range(-(-length // PAGE))],
        )
        for length in lengths
    ]


class Unrecorded:
    """What a recording is made of, without it: one padded pass for all."""

    def __init__(self, model: RecurrentLM, cache: PagedKeyValues) -> None:
        self.of = partial(PaddedPass, model, cache=cache, size=32)
        self.made: PaddedPass | None = None
        self.calls = 0

    def __call__(self, steps: Plan, layout: Layout) -> Tensor:
        self.made = self.made or self.of(steps=steps)
        self.made.take(layout)
        self.calls += 1
        return self.made.run()


def same(found: PagedKeyValues, expected: PagedKeyValues) -> None:
    """All pages but that of nobody."""
    for ours, theirs in ((found.keys, expected.keys), (found.values, expected.values)):
        torch.testing.assert_close(ours[:, 1:], theirs[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_padded_pass_equals_the_plain_one() -> None:
    """Again and again in the same memory: what is left of longer batches changes nothing."""
    plain, fused = models()
    steps = plan(CONFIG)
    found, expected = cache(), cache()
    recorded = GraphedPrefill(fused, found) if DEVICE.type == "cuda" else Unrecorded(fused, found)
    for seed, lengths in enumerate(([13, 1, 18], [5], [9, 7, 2, 3])):
        asked = texts(lengths, seed)
        states = prefill(fused, steps, found, asked, recorded)
        torch.testing.assert_close(states, prefill(plain, steps, expected, asked), rtol=1e-4, atol=1e-4)
        same(found, expected)


def test_what_the_cache_has_is_not_recorded() -> None:
    plain, fused = models()
    steps = plan(CONFIG)
    found, expected = cache(), cache()
    first = texts([9])
    recorded = Unrecorded(fused, found)
    prefill(fused, steps, found, first, recorded)
    prefill(plain, steps, expected, first)
    new = NewTokens([3, 4, 5], 9, [(0, 4), (9, 11)], [*first[0].pages[:2], 38])
    found.copy_page(first[0].pages[2], 38)
    expected.copy_page(first[0].pages[2], 38)
    alone = texts([6], seed=5)[0]
    asked = [new, NewTokens(alone.ids, 0, alone.blocks, [39, 37])]
    states = prefill(fused, steps, found, asked, recorded)
    torch.testing.assert_close(states, prefill(plain, steps, expected, asked), rtol=1e-4, atol=1e-4)
    assert recorded.calls == 2, "the new text is, the one that goes on is not"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
def test_long_or_many_texts_are_launched_one_by_one() -> None:
    _, fused = models()
    recorded = GraphedPrefill(fused, cache())
    steps = plan(CONFIG)
    assert recorded(steps, Layout.of(texts([1] * (MOST_TEXTS + 1)), PAGE)) is None
    few = Layout.of(texts([20, 30]), PAGE)
    hidden = recorded(steps, few)
    assert hidden is not None and len(hidden) == 64
