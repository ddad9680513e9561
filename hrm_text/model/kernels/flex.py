"""PyTorch's FlexAttention with a PrefixLM block mask, built once per packed batch: the path for CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hrm_text.model.attention import Spans


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
        y: Tensor = attend(q, k, v, block_mask=self.mask)
        return y.squeeze(0).transpose(0, 1)


def block_mask(spans: Spans, num_tokens: int, device: torch.device) -> BlockMask:
    """The PrefixLM mask of a packed batch; padding belongs to sample -1 and attends to nothing."""
    lengths = spans.lengths
    padding = num_tokens - int(spans.starts[-1])
    sample_T = torch.cat([torch.arange(len(lengths)).repeat_interleave(lengths), torch.full((padding,), -1)])
    # The first token past the prefix of each token's sample, in the numbering of the packed batch.
    prefix_end_T = torch.cat(
        [(spans.starts[:-1] + spans.prefix_lengths).repeat_interleave(lengths), torch.zeros(padding)]
    )
    sample_T, prefix_end_T = sample_T.to(device, torch.int32), prefix_end_T.to(device, torch.int32)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        same = (sample_T[q] == sample_T[kv]) & (sample_T[q] >= 0)
        return same & ((kv <= q) | (kv < prefix_end_T[q]))

    mask: BlockMask = compiled(create_block_mask)(visible, None, None, num_tokens, num_tokens, device=str(device))
    return mask
