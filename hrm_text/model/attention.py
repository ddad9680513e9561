"""The definition of attention over a packed batch: PrefixLM inside every sample, nothing across samples.

This plain form is what every faster one in ``kernels/`` must equal, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """Where the samples of a packed batch lie: S samples in T tokens; tokens past ``starts[-1]`` are padding."""

    starts: Tensor
    """LongTensor [S + 1], on the CPU: sample s is the tokens starts[s] to starts[s + 1]."""
    prefix_lengths: Tensor
    """LongTensor [S], on the CPU: leading tokens of each sample that see each other both ways; 0 is causal."""

    @property
    def lengths(self) -> Tensor:
        """LongTensor [S]: tokens of each sample."""
        return self.starts.diff()

    @staticmethod
    def of_samples(lengths: Tensor, prefix_lengths: Tensor) -> Spans:
        """Samples of these lengths, laid end to end."""
        return Spans(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), prefix_lengths)


class Attention(Protocol):
    """How the blocks of one forward pass attend: to their own packed batch, or to a key-value cache."""

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int, /) -> Tensor:
        """Attend with T queries of N heads of width H. ``slot`` numbers the (module call, layer) that asks."""
        ...


def prefix_mask(starts: Tensor, prefix_lengths: Tensor, num_tokens: int) -> Tensor:
    """BoolTensor [T, T], True where the row's token may attend to the column's token.

    Both in one sample, and the column is in the sample's prefix or not later than the row. Padding attends to nothing.
    """
    token = torch.arange(num_tokens)
    sample = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    inside = sample < len(prefix_lengths)
    safe = sample.clamp(max=max(len(prefix_lengths) - 1, 0))
    in_prefix = inside & (token - starts[safe] < prefix_lengths[safe]) if len(prefix_lengths) else inside
    same_sample = (sample[:, None] == sample[None, :]) & inside[:, None]
    return same_sample & (in_prefix[None, :] | (token[None, :] <= token[:, None]))


class PlainAttention:
    """softmax(q k^T / sqrt(H) + mask) v with the whole T x T mask: the definition, for tests and small batches."""

    def __init__(self, spans: Spans, num_tokens: int, device: torch.device) -> None:
        self.mask_TT = prefix_mask(spans.starts, spans.prefix_lengths, num_tokens).to(device)

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        """Attend within the batch; padding gets zeros. ``slot`` does not matter."""
        scores_NTT = torch.einsum("qnh,knh->nqk", q_TNH.float(), k_TNH.float()) * q_TNH.shape[-1] ** -0.5
        weights_NTT = scores_NTT.masked_fill(~self.mask_TT, -torch.inf).softmax(-1)
        weights_NTT = weights_NTT.nan_to_num(0.0)  # a padded row sees nothing at all
        return torch.einsum("nqk,knh->qnh", weights_NTT, v_TNH.float()).to(v_TNH.dtype)
