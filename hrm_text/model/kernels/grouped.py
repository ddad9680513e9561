"""Attention whose cost follows the real sample lengths: samples of similar length share one padded batch.

No T x T mask is ever made. Samples are sorted by length and cut into groups in which the shortest is at least three
quarters of the longest, but for the first, which has all that are short. Each group is one call of
scaled_dot_product_attention on [samples, heads, longest, head_dim].
This is the path for CPUs, for MPS and for anything without a kernel of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.model.attention import Spans
from hrm_text.model.kernels.transfer import to_device

# A group ends where padding would pass this share, unless the samples are so short that a call costs more than padding.
LEAST_FILL = 0.75
SHORT = 64
"""Tokens up to which samples share the first group: a step on short samples is a sixth faster so on two cores."""


@dataclass(frozen=True)
class Group:
    """G samples of at most M tokens each."""

    gather_GM: Tensor
    """The token each padded place reads; places past a sample's end read its first token and are masked."""
    mask_G1MM: Tensor
    """True where a query may attend to a key."""

    def padded(self, x_TNH: Tensor) -> Tensor:
        """[G, N, M, H]: the group's tokens of a packed tensor, heads first."""
        rows = x_TNH.index_select(0, self.gather_GM.flatten())
        return rows.view(*self.gather_GM.shape, *x_TNH.shape[1:]).transpose(1, 2)


class GroupedAttention:
    """Attention over a packed batch, group by group of similar length."""

    def __init__(self, spans: Spans, num_tokens: int, device: torch.device) -> None:
        members_of_groups = similar_lengths(spans.lengths)
        groups = [make_group(spans, members) for members in members_of_groups]
        # The row of the groups' stacked outputs that holds each token's result; padding reads the row of zeros behind.
        total = sum(gather_GM.numel() for gather_GM, _ in groups)
        scatter_T = torch.full((num_tokens,), total)
        offset = 0
        for (gather_GM, _), members in zip(groups, members_of_groups, strict=True):
            width = gather_GM.shape[1]
            inside = torch.arange(width) < spans.lengths[members][:, None]
            places = offset + torch.arange(len(members))[:, None] * width + torch.arange(width)
            scatter_T[gather_GM[inside]] = places[inside]
            offset += gather_GM.numel()
        self.scatter_T, *gathers = to_device([scatter_T, *(gather_GM for gather_GM, _ in groups)], device)
        masks = to_device([mask_G1MM for _, mask_G1MM in groups], device)
        self.groups = [Group(gather_GM, mask_G1MM) for gather_GM, mask_G1MM in zip(gathers, masks, strict=True)]

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        """Attend within the batch; padding gets zeros. ``slot`` does not matter."""
        outputs = []
        for group in self.groups:
            q, k, v = (group.padded(x_TNH) for x_TNH in (q_TNH, k_TNH, v_TNH))
            outputs.append(F.scaled_dot_product_attention(q, k, v, group.mask_G1MM).transpose(1, 2).flatten(0, 1))
        zero = v_TNH.new_zeros(1, *v_TNH.shape[1:])
        # index_select, because its backward pass is several times faster on a CPU than that of x[index].
        return torch.cat([*outputs, zero]).index_select(0, self.scatter_T)


def similar_lengths(lengths_S: Tensor) -> list[Tensor]:
    """Partition the samples into groups of similar length: LongTensors of sample numbers, shortest first."""
    order = lengths_S.argsort(stable=True).tolist()
    groups: list[list[int]] = []
    shortest = 0
    for sample in order:
        length = int(lengths_S[sample])
        if length == 0:
            continue
        if not groups or (length > SHORT and shortest < LEAST_FILL * length):
            groups.append([])
            shortest = length
        groups[-1].append(sample)
    return [torch.tensor(group) for group in groups]


def make_group(spans: Spans, members: Tensor) -> tuple[Tensor, Tensor]:
    """Gather index and mask of one group of samples, as in ``Group``, on the CPU."""
    lengths, prefixes, starts = spans.lengths[members], spans.prefix_lengths[members], spans.starts[:-1][members]
    place = torch.arange(int(lengths.max()))
    inside_GM = place < lengths[:, None]
    gather_GM = starts[:, None] + torch.where(inside_GM, place, 0)
    causal_MM = place[None, :] <= place[:, None]
    in_prefix_GM = place < prefixes[:, None]
    # A padded query sees what the causal mask gives it, so that no row of the softmax is empty.
    mask_GMM = (causal_MM | in_prefix_GM[:, None, :]) & inside_GM[:, None, :]
    return gather_GM, mask_GMM[:, None]
