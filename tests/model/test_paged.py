from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hrm_text.model.attention import PlainAttention, Spans
from hrm_text.model.config import ModelConfig, preset
from hrm_text.model.paged import PagedKeyValues, quantize

CPU = torch.device("cpu")
CONFIG = preset("tiny", vocab_size=96)
PAGE, SLOT = 4, 5
LENGTHS = [1, 4, 5, 11]
TABLE = torch.tensor([[7, 0, 0], [2, 0, 0], [9, 1, 0], [3, 8, 4]])


def filled(config: ModelConfig, dtype: torch.dtype) -> tuple[PagedKeyValues, list[Tensor], list[Tensor]]:
    """A cache in which four texts lie on scattered pages, among numbers that nobody may see; their keys and values."""
    cache = PagedKeyValues.allocate(config, 10, PAGE, CPU, dtype)
    for store in (cache.keys, cache.values):
        store.fill_(100)
    keys, values = ([torch.randn(length, config.num_heads, config.head_dim) for length in LENGTHS] for _ in range(2))
    for row, length in enumerate(LENGTHS):
        position = torch.arange(length)
        cache.write(SLOT, TABLE[row][position // PAGE], position % PAGE, keys[row], values[row])
    return cache, keys, values


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.int8, 2e-2)])
def test_attention_over_pages_equals_attention_over_the_text(dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    cache, keys, values = filled(CONFIG, dtype)
    q_BNH = torch.randn(len(LENGTHS), CONFIG.num_heads, CONFIG.head_dim)
    found = cache.attend(SLOT, q_BNH, TABLE, torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        attention = PlainAttention(Spans.of_samples(torch.tensor([length]), torch.tensor([0])), length, CPU)
        q_LNH = q_BNH[row].expand(length, -1, -1)
        expected = attention(q_LNH, keys[row], values[row], 0)[-1]
        torch.testing.assert_close(found[row], expected, rtol=error, atol=error)


def test_a_text_sees_its_own_pages_and_slot_alone() -> None:
    torch.manual_seed(1)
    cache, _, _ = filled(CONFIG, torch.float32)
    q_BNH = torch.randn(len(LENGTHS), CONFIG.num_heads, CONFIG.head_dim)
    before = cache.attend(SLOT, q_BNH, TABLE, torch.tensor(LENGTHS))
    cache.write(SLOT, torch.tensor([9, 3]), torch.tensor([1, 2]), *torch.randn(2, 2, CONFIG.num_heads, CONFIG.head_dim))
    cache.write(SLOT + 1, torch.tensor([2]), torch.tensor([0]), *torch.randn(2, 1, CONFIG.num_heads, CONFIG.head_dim))
    cache.write(SLOT, torch.tensor([1]), torch.tensor([1]), *torch.randn(2, 1, CONFIG.num_heads, CONFIG.head_dim))
    after = cache.attend(SLOT, q_BNH, TABLE, torch.tensor(LENGTHS))
    assert [bool((a == b).all()) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 0.0), (torch.int8, 1 / 127)])
def test_gathering_gives_back_what_was_written_and_a_copied_page_the_same(dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(2)
    cache, keys, values = filled(CONFIG, dtype)
    cache.copy_page(8, 6)
    for pages in (TABLE[3], torch.tensor([3, 6, 4])):
        for found, expected in zip(cache.gather(SLOT, pages, 11, torch.float32), (keys[3], values[3]), strict=True):
            assert ((found - expected).abs().amax(-1) <= error * expected.abs().amax(-1)).all()


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    x = torch.randn(7, 3, 32, dtype=torch.float64).to(torch.float32) * torch.logspace(-6, 6, 7)[:, None, None]
    integers, scales = quantize(x)
    assert integers.dtype == torch.int8 and int(integers.abs().max()) == 127
    assert ((integers * scales[..., None] - x).abs() <= scales[..., None] * 0.5001).all()
    assert (quantize(torch.zeros(2, 4))[0] == 0).all()


def test_the_cache_has_the_size_the_configuration_says() -> None:
    cache = PagedKeyValues.allocate(CONFIG, 6, PAGE, CPU, torch.bfloat16)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (cache.keys, cache.values))
    assert stored == 6 * PAGE * CONFIG.cache_bytes_per_token()
    assert (cache.num_pages, cache.page_size) == (6, PAGE)
