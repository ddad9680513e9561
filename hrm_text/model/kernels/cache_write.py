"""Keys and values of many tokens to their pages in one launch: ``PagedKeyValues.write`` on a GPU, in Triton.

A prompt stores those of every block. As PyTorch's own operations that is a scatter each for keys and values, and with
8 bits eleven kernels each, which a host launches more slowly than a GPU computes the rest of the block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hrm_text.model.kernels.decode_attention import ROUND
from hrm_text.model.paged import PagedKeyValues

# T tokens, N heads, H head width, P tokens a page


@triton.jit
def _store_rows(
    x_TH, store, scales, row_T, inside_T, H: tl.constexpr, BLOCK_H: tl.constexpr, QUANTIZED: tl.constexpr
):  # fmt: skip
    """Rows of a store [rows, H] that lie anywhere; in 8 bits as ``paged.quantize`` makes them."""
    h = tl.arange(0, BLOCK_H)
    there_TH = store + row_T[:, None] * H + h[None, :]
    inside_TH = inside_T[:, None] & (h[None, :] < H)
    if QUANTIZED:
        x_TH = x_TH.to(tl.float32)
        scale_T = tl.maximum(tl.max(tl.abs(x_TH), 1), 1e-12)
        scale_T = tl.div_rn(scale_T, tl.zeros_like(scale_T) + 127.0)
        whole_TH = (tl.div_rn(x_TH, tl.zeros_like(x_TH) + scale_T[:, None]) + ROUND) - ROUND
        tl.store(there_TH, whole_TH.to(tl.int8), mask=inside_TH)
        tl.store(scales + row_T, scale_T, mask=inside_T)
    else:
        tl.store(there_TH, x_TH.to(store.dtype.element_ty), mask=inside_TH)


@triton.jit(do_not_specialize=["slot", "slot_rows", "num_tokens"])
def write_pages(
    k,
    v,
    keys,
    values,
    key_scales,
    value_scales,
    pages,
    places,
    slot,
    slot_rows,
    num_tokens,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    N: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """One head of a block of tokens; the grid is (blocks, N). A store is rows of H, ``slot_rows`` of them in a slot."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    inside_T = t < num_tokens
    page_T = tl.load(pages + t, mask=inside_T, other=0).to(tl.int64)
    place_T = tl.load(places + t, mask=inside_T, other=0).to(tl.int64)
    row_T = slot.to(tl.int64) * slot_rows + (page_T * N + head) * P + place_T
    inside_TH = inside_T[:, None] & (h[None, :] < H)
    t_T1 = t[:, None].to(tl.int64)
    k_TH = tl.load(k + t_T1 * k_token_stride + head * k_head_stride + h[None, :], mask=inside_TH, other=0.0)
    v_TH = tl.load(v + t_T1 * v_token_stride + head * v_head_stride + h[None, :], mask=inside_TH, other=0.0)
    _store_rows(k_TH, keys, key_scales, row_T, inside_T, H, BLOCK_H, QUANTIZED)
    _store_rows(v_TH, values, value_scales, row_T, inside_T, H, BLOCK_H, QUANTIZED)


TOKENS = 16
"""Tokens of a program."""


def write(cache: PagedKeyValues, slot: int, pages_T: Tensor, places_T: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> None:
    """``PagedKeyValues.write`` in one launch; keys and values may be views of any strides whose H is contiguous.

    Where several tokens go to one place, which only page 0 allows, any of them may be what stays.
    """
    tokens, heads, width = k_TNH.shape
    _, pages, _, page_size, _ = cache.keys.shape
    k_TNH, v_TNH = (x_TNH if x_TNH.stride(2) == 1 else x_TNH.contiguous() for x_TNH in (k_TNH, v_TNH))
    pages_T, places_T = pages_T.contiguous(), places_T.contiguous()
    scales = (cache.keys, cache.values)
    if cache.key_scales is not None and cache.value_scales is not None:
        scales = (cache.key_scales, cache.value_scales)
    if tokens:
        write_pages[(triton.cdiv(tokens, TOKENS), heads)](
            k_TNH, v_TNH, cache.keys, cache.values, *scales, pages_T, places_T, slot, pages * heads * page_size, tokens,
            k_TNH.stride(0), k_TNH.stride(1), v_TNH.stride(0), v_TNH.stride(1),
            heads, page_size, width, TOKENS, triton.next_power_of_2(width), cache.key_scales is not None,
        )  # fmt: skip
