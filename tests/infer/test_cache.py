from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hrm_text.infer.cache import KeyValueCache
from hrm_text.model.attention import Spans
from hrm_text.model.config import RECURRENCE, preset
from hrm_text.model.recurrence import RecurrentLM, build

CPU = torch.device("cpu")
LENGTHS, PREFIXES = [5, 1, 12], [5, 1, 7]


def make(architecture: str, norm: str = "magic") -> RecurrentLM:
    return build(
        preset("tiny", vocab_size=96, max_position_embeddings=64, architecture=architecture, norm=norm), seed=5
    )


def texts(new_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(96, (length + new_tokens,), generator=generator) for length in LENGTHS]


def prefilled(model: RecurrentLM, samples: list[Tensor], capacity: int) -> tuple[KeyValueCache, Tensor]:
    """A cache that holds the first LENGTHS tokens of each sample, and the logits at the last of them."""
    cache = KeyValueCache(model.config, len(samples), capacity, CPU, torch.float32)
    spans = Spans.of_samples(torch.tensor(LENGTHS), torch.tensor(PREFIXES))
    ids = torch.cat([sample[:length] for sample, length in zip(samples, LENGTHS, strict=True)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    hidden = model(ids, positions, cache.prefill(spans))
    return cache, model.lm_head(hidden[spans.starts[1:] - 1])


@torch.no_grad()
@pytest.mark.parametrize("architecture", list(RECURRENCE))
@pytest.mark.parametrize("norm", ["magic", "pre", "post"])
def test_decoding_with_the_cache_equals_the_full_forward(architecture: str, norm: str) -> None:
    model, new = make(architecture, norm), 6
    samples = texts(new)
    full = [model.logits(s[None], torch.tensor([p]))[0] for s, p in zip(samples, PREFIXES, strict=True)]
    cache, logits = prefilled(model, samples, capacity=4)  # too small: it must grow
    for made in range(new + 1):
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(logits[row], full[row][length + made - 1], rtol=1e-4, atol=1e-5)
        if made < new:
            ids = torch.stack([sample[length + made] for sample, length in zip(samples, LENGTHS, strict=True)])
            logits = model.lm_head(model(ids, cache.lengths_B, cache.decode()))
    assert cache.lengths_B.tolist() == [length + new for length in LENGTHS]


@torch.no_grad()
def test_dropping_sequences_leaves_the_others_as_they_were() -> None:
    model, samples = make("hrm"), texts(1)
    ids = torch.stack([sample[-1] for sample in samples])
    whole, _ = prefilled(model, samples, capacity=20)
    expected = model(ids, whole.lengths_B, whole.decode())
    cut, _ = prefilled(model, samples, capacity=20)
    rows = torch.tensor([2, 0])
    cut.keep(rows)
    assert cut.lengths_B.tolist() == [12, 5]
    torch.testing.assert_close(model(ids[rows], cut.lengths_B, cut.decode()), expected[rows])


def test_the_cache_has_the_size_the_configuration_says() -> None:
    config = preset("tiny", vocab_size=96)
    cache = KeyValueCache(config, 3, 10, CPU, torch.bfloat16)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (cache.keys, cache.values))
    assert stored == 3 * 10 * config.cache_bytes_per_token()
    assert cache.capacity == 10
    cache.grow(4)
    assert cache.capacity == 10
    cache.grow(11)
    assert cache.capacity == 11
