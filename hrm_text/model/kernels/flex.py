"""PyTorch's FlexAttention with a PrefixLM block mask, worked out on the host once per packed batch: for CUDA.

What a query may see is one range of keys, so the mask is two numbers a query and the blocks follow from the ranges
without a T x T mask. All shapes depend on the number of tokens alone: nothing compiles again over a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hrm_text.model.attention import Spans
from hrm_text.model.kernels.transfer import to_device

QUERY_BLOCK, KEY_BLOCK = 128, 128
"""Tokens of the blocks that are skipped where nothing is visible; the kernels' tiles must divide them."""

KERNEL_OPTIONS: dict[str, Any] = {}
"""Tiles of the kernels, where PyTorch's choice is not the best: BLOCK_M, BLOCK_N (forward), BLOCK_M1 to BLOCK_N2."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled form of a function; compiled once a process, and only when first used."""
    return torch.compile(function, dynamic=False)


def compiled_unless_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself inside a block that is being compiled already; its compiled form elsewhere."""
    return function if torch.compiler.is_compiling() else compiled(function)


class FlexAttention:
    """Attention over a packed batch; blocks of the mask in which nothing is visible are skipped."""

    def __init__(self, spans: Spans, num_tokens: int, device: torch.device) -> None:
        self.mask = block_mask(spans, num_tokens, device)

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        """Attend within the batch; padding gets zeros. ``slot`` does not matter."""
        q, k, v = (x_TNH.transpose(0, 1).unsqueeze(0) for x_TNH in (q_TNH, k_TNH, v_TNH))
        attend = compiled_unless_compiling(flex_attention)
        y: Tensor = attend(q, k, v, block_mask=self.mask, kernel_options=KERNEL_OPTIONS or None)
        return y.squeeze(0).transpose(0, 1)


def visible_ranges(spans: Spans, num_tokens: int) -> tuple[Tensor, Tensor]:
    """First key that each token sees, and the one past the last: LongTensors [T]; 0 and 0 for padding."""
    end = int(spans.starts[-1])
    first_T, past_T = torch.zeros(2, num_tokens, dtype=torch.long).unbind(0)
    first_T[:end] = spans.starts[:-1].repeat_interleave(spans.lengths)
    past_prefix_T = (spans.starts[:-1] + spans.prefix_lengths).repeat_interleave(spans.lengths)
    past_T[:end] = torch.maximum(past_prefix_T, torch.arange(1, end + 1))
    return first_T, past_T


def block_mask(spans: Spans, num_tokens: int, device: torch.device) -> BlockMask:
    """The PrefixLM mask of a packed batch, equal to what ``create_block_mask`` makes from the same mask function."""
    first_T, past_T = visible_ranges(spans, num_tokens)
    query_blocks, key_blocks = -(-num_tokens // QUERY_BLOCK), -(-num_tokens // KEY_BLOCK)
    # The last block may be longer than what is left; those rows see nothing, as padding does.
    rows = torch.zeros(2, query_blocks * QUERY_BLOCK, dtype=torch.long)
    rows[0, :num_tokens], rows[1, :num_tokens] = first_T, past_T
    first_BQ, past_BQ = rows.view(2, query_blocks, QUERY_BLOCK).unbind(0)
    edge_B = torch.arange(key_blocks) * KEY_BLOCK
    # A sample's ranges all begin where it begins and reach at least their own row, so those of a block leave no gap.
    some_BB = (edge_B < past_BQ.amax(1, keepdim=True)) & (edge_B + KEY_BLOCK > first_BQ[:, :1])
    full_BB = (edge_B >= first_BQ.amax(1, keepdim=True)) & (edge_B + KEY_BLOCK <= past_BQ.amin(1, keepdim=True))
    part_BB = some_BB & ~full_BB
    lists = [x for blocks_BB in (part_BB, full_BB, part_BB.T, full_BB.T) for x in ordered(blocks_BB)]
    first_T, past_T, *lists = to_device([x.int() for x in (first_T, past_T, *lists)], device)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= first_T[q]) & (kv < past_T[q])

    return BlockMask(
        seq_lengths=(num_tokens, num_tokens),
        kv_num_blocks=lists[0],
        kv_indices=lists[1],
        full_kv_num_blocks=lists[2],
        full_kv_indices=lists[3],
        q_num_blocks=lists[4],
        q_indices=lists[5],
        full_q_num_blocks=lists[6],
        full_q_indices=lists[7],
        BLOCK_SIZE=(QUERY_BLOCK, KEY_BLOCK),
        mask_mod=visible,
    )


def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A BoolTensor [rows, columns] as flex_attention wants it.

    How many are True in each row, [1, 1, rows]; and the columns, those that are True first, [1, 1, rows, columns].
    """
    return blocks.sum(1)[None, None], blocks.int().argsort(dim=1, descending=True, stable=True)[None, None]
