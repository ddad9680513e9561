"""PrefixLM attention from a kernel that knows only full and causal attention over segments of varied length.

Two passes: the prefix tokens of every sample among themselves, full; then the response tokens as queries on their whole
sample, causal with the diagonal ending in the bottom right corner: the last response token sees the whole sample.
Both are compacted: no segment has length zero, which kernels treat differently, and no token is attended for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.attention import Spans
from hrm_text.model.kernels.transfer import to_device

# T packed tokens, of which P are in a prefix and R in a response; N heads, H head width


@dataclass(frozen=True)
class Segments:
    """Segment i is the queries starts_q[i] to starts_q[i + 1] on the keys starts_k[i] to starts_k[i + 1]."""

    starts_q: Tensor
    """IntTensor [segments + 1], int32 on the device."""
    starts_k: Tensor
    """The same of the keys; the same object where every segment attends to itself."""
    longest_q: int
    longest_k: int


HALVES = (torch.bfloat16, torch.float16)
"""What FlashAttention computes in, all versions of it."""

VarlenFunction = Callable[[Tensor, Tensor, Tensor, Segments, bool], Tensor]
"""(q [queries, N, H], k and v [keys, N, H], segments, causal) -> [queries, N, H]; causal is at the bottom right."""


class TwoPassAttention:
    """Attention over a packed batch by two calls of a function for segments of varied length."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    """What the function computes in."""

    def __init__(self, function: VarlenFunction, spans: Spans, num_tokens: int, device: torch.device) -> None:
        self.function, self.num_tokens = function, num_tokens
        lengths, prefixes = spans.lengths, spans.prefix_lengths
        self.end = int(spans.starts[-1])
        sample_T = torch.arange(len(lengths)).repeat_interleave(lengths)
        token_T = torch.arange(self.end)
        in_prefix_T = token_T - spans.starts[sample_T] < prefixes[sample_T]
        has_prefix, has_response = prefixes > 0, lengths > prefixes
        self.has_prefixes, self.has_responses = bool(has_prefix.any()), bool(has_response.any())
        # Where a sample is all prefix, the second pass leaves out its keys; else its keys are the batch as it lies.
        self.all_keys = bool((has_response | (lengths == 0)).all())
        keys = token_T[:0] if self.all_keys else token_T[has_response[sample_T]]
        runs = [prefixes[has_prefix], (lengths - prefixes)[has_response], lengths[has_response]]
        indices = [token_T[in_prefix_T], token_T[~in_prefix_T], keys]
        self.prefix_P, self.response_R, self.keys, *starts = to_device([*indices, *map(starts_of, runs)], device)
        starts_p, starts_r, starts_k = (x.int() for x in starts)
        longest_p, longest_r, longest_k = (max(run.tolist(), default=0) for run in runs)
        self.prefix_segments = Segments(starts_p, starts_p, longest_p, longest_p)
        self.response_segments = Segments(starts_r, starts_k, longest_r, longest_k)

    # The sizes above differ from batch to batch: inside a compiled block each batch would compile anew.
    @torch.compiler.disable
    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        """Attend within the batch; padding gets zeros. ``slot`` does not matter."""
        if q_TNH.dtype not in self.dtypes:
            raise UserError(self._wrong_dtype(q_TNH))
        q_PNH, q_RNH = Take.apply(q_TNH, self.prefix_P, self.response_R)
        parts = [q_PNH, q_RNH]
        if self.has_prefixes:
            (k_PNH,), (v_PNH,) = (Take.apply(x_TNH, self.prefix_P) for x_TNH in (k_TNH, v_TNH))
            parts[0] = self.function(q_PNH, k_PNH, v_PNH, self.prefix_segments, False)
        if self.has_responses:
            keys, values = (self._of_responses(x_TNH) for x_TNH in (k_TNH, v_TNH))
            parts[1] = self.function(q_RNH, keys, values, self.response_segments, True)
        y_TNH: Tensor = Place.apply(self.num_tokens, *parts, self.prefix_P, self.response_R)
        return y_TNH

    def _of_responses(self, x_TNH: Tensor) -> Tensor:
        """The tokens of all samples that have a response."""
        if self.all_keys:
            return x_TNH[: self.end]
        (rows,) = Take.apply(x_TNH, self.keys)
        return rows

    def _wrong_dtype(self, x: Tensor) -> str:
        from hrm_text.model.kernels import available_backends

        able, found = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes), str(x.dtype)
        return (
            f"{self.name} attention computes in {able}, found {found.removeprefix('torch.')}; "
            f"choose from {', '.join(available_backends(x.device, x.dtype))}"
        )


def starts_of(lengths: Tensor) -> Tensor:
    """Where segments of these lengths start, and where the last one ends: LongTensor [segments + 1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


class Take(torch.autograd.Function):
    """Rows of a tensor by index, once for each index. Indices do not overlap and none has a row twice.

    So the gradient is a copy of rows where that of ``index_select`` is a sum by atomics, slow in bf16 and not the same
    from run to run. ``Place`` is the transpose.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        ctx.num_rows = len(x)
        ctx.save_for_backward(*indices)
        return tuple(x.index_select(0, index) for index in indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        indices = ctx.saved_tensors
        return placed(ctx.num_rows, gradients, indices), *[None] * len(indices)


class Place(torch.autograd.Function):
    """Two tensors' rows, each at its index among ``num_rows``; zeros elsewhere. The transpose of ``Take``."""

    @staticmethod
    def forward(ctx: Any, num_rows: int, first: Tensor, second: Tensor, *indices: Tensor) -> Tensor:
        ctx.save_for_backward(*indices)
        return placed(num_rows, (first, second), indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        return None, gradient.index_select(0, first), gradient.index_select(0, second), None, None


def placed(num_rows: int, parts: tuple[Tensor, ...], indices: tuple[Tensor, ...]) -> Tensor:
    """[num_rows, ...]: each part's rows at its index, zeros elsewhere."""
    out = parts[0].new_zeros(num_rows, *parts[0].shape[1:])
    for part, index in zip(parts, indices, strict=True):
        out.index_copy_(0, index, part)
    return out
