"""One launch stores what the definition stores, to the bit: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedKeyValues

pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed")

from hrm_text.model.kernels.cache_write import TOKENS, write

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGES, PAGE, SLOT = 9, 5, 3


def config(head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="transformer",
        vocab_size=32,
        max_position_embeddings=64,
        hidden_size=24,
        num_layers=5,
        num_heads=3,
        head_dim=head_dim,
        inner_multiple=8,
    )


def noisy(config: ModelConfig, dtype: torch.dtype) -> PagedKeyValues:
    """A cache on the CPU in which nothing is zero, so that whatever is written where it must not is seen."""
    cache = PagedKeyValues.allocate(config, PAGES, PAGE, CPU, dtype)
    for store in stores(cache):
        store.copy_(torch.randint(1, 100, store.shape))
    return cache


def stores(cache: PagedKeyValues) -> list[Tensor]:
    return [x for x in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if x is not None]


def moved(cache: PagedKeyValues) -> PagedKeyValues:
    """A copy on the device."""
    return PagedKeyValues(*(store.to(DEVICE, copy=True) for store in stores(cache)))


def scattered(tokens: int) -> tuple[Tensor, Tensor]:
    """Pages and places of so many tokens, no two the same."""
    rows = torch.randperm(PAGES * PAGE)[:tokens]
    return rows // PAGE, rows % PAGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("head_dim", [16, 6])
@pytest.mark.parametrize("tokens", [0, 1, TOKENS, 2 * TOKENS + 5])
def test_what_is_stored_is_what_the_definition_stores(dtype: torch.dtype, head_dim: int, tokens: int) -> None:
    torch.manual_seed(0)
    expected = noisy(config(head_dim), dtype)
    found = moved(expected)
    pages, places = scattered(tokens)
    # As views of a block's product: keys and values of a token lie apart, and here their layouts differ too.
    gqkv = torch.randn(tokens, 4, 3, head_dim) * torch.logspace(-4, 4, tokens)[:, None, None, None]
    k_TNH, v_TNH = gqkv[:, 2], torch.randn(3, tokens, head_dim).transpose(0, 1)
    if tokens > 1:
        k_TNH[0, 1] = 0
        k_TNH[1, 0, :2] = torch.tensor([127.0, 2.5])  # a half
    expected.write(SLOT, pages, places, k_TNH, v_TNH)
    gqkv, v_TNH = gqkv.to(DEVICE), v_TNH.to(DEVICE)
    write(found, SLOT, pages.to(DEVICE), places.to(DEVICE), gqkv[:, 2], v_TNH)
    for theirs, ours in zip(stores(expected), stores(found), strict=True):
        assert torch.equal(theirs, ours.cpu())


def test_numbers_of_the_cache_s_own_kind_are_copied() -> None:
    torch.manual_seed(1)
    expected = noisy(config(16), torch.bfloat16)
    found = moved(expected)
    pages, places = scattered(20)
    k_TNH, v_TNH = torch.randn(2, 20, 3, 16).bfloat16().unbind(0)
    expected.write(SLOT, pages, places, k_TNH, v_TNH)
    write(found, SLOT, *(x.to(DEVICE) for x in (pages, places, k_TNH, v_TNH)))
    assert torch.equal(expected.keys, found.keys.cpu()) and torch.equal(expected.values, found.values.cpu())


def test_heads_whose_numbers_lie_apart() -> None:
    torch.manual_seed(2)
    expected = noisy(config(16), torch.float32)
    found = moved(expected)
    pages, places = scattered(7)
    k_TNH, v_TNH = torch.randn(2, 16, 7, 3).permute(0, 2, 3, 1).unbind(0)
    expected.write(SLOT, pages, places, k_TNH, v_TNH)
    write(found, SLOT, *(x.to(DEVICE) for x in (pages, places, k_TNH, v_TNH)))
    assert torch.equal(expected.keys, found.keys.cpu()) and torch.equal(expected.values, found.values.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_on_a_gpu_a_cache_writes_by_the_kernel(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    expected = noisy(config(16), dtype)
    found = moved(expected)
    pages, places = scattered(20)
    k_TNH, v_TNH = torch.randn(2, 20, 3, 16).bfloat16().unbind(0)
    expected.write(SLOT, pages, places, k_TNH, v_TNH)
    found.write(SLOT, *(x.to(DEVICE) for x in (pages, places, k_TNH, v_TNH)))
    for theirs, ours in zip(stores(expected), stores(found), strict=True):
        assert torch.equal(theirs, ours.cpu())
