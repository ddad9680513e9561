from __future__ import annotations

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.recipes.synthetic import CONTEXT, DISTRIBUTIONS, synthetic_spans


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_tokens", [12_288, 21_504])
def test_batches_are_full_of_samples_that_fit_the_context(distribution: str, num_tokens: int) -> None:
    for seed in range(5):
        spans = synthetic_spans(distribution, num_tokens, seed)
        assert spans.lengths.max() <= CONTEXT
        assert (spans.prefix_lengths >= 0).all() and (spans.prefix_lengths < spans.lengths).all()
        # 21,504 is five contexts and a quarter, which no sample of "long" fits.
        least = 0.95 if distribution == "long" else 0.98
        assert least * num_tokens <= int(spans.starts[-1]) <= num_tokens


def test_a_seed_is_a_batch() -> None:
    once, again, other = (synthetic_spans("anchor", 4096, seed) for seed in (1, 1, 2))
    assert torch.equal(once.starts, again.starts) and torch.equal(once.prefix_lengths, again.prefix_lengths)
    assert not torch.equal(once.lengths, other.lengths)


def test_the_anchor_has_about_as_many_samples_as_where_it_was_measured() -> None:
    counts = [len(synthetic_spans("anchor", 12_288, seed).lengths) for seed in range(20)]
    assert 24 <= sum(counts) / 20 <= 40  # "about 32 samples per 12,288 tokens"


def test_a_small_batch_is_one_sample_that_fills_it() -> None:
    spans = synthetic_spans("long", 64, 0)
    assert spans.lengths.tolist() == [64] and spans.prefix_lengths.tolist() == [16]


def test_an_unknown_distribution_lists_them() -> None:
    with pytest.raises(UserError, match="unknown distribution 'odd'; choose from anchor, short"):
        synthetic_spans("odd", 64, 0)
