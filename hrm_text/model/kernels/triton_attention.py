"""PrefixLM attention by the kernels of ``attention_kernels``: their sizes, their launches, and the packed batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrm_text.model.attention import Spans
from hrm_text.model.kernels.attention_kernels import (
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
)
from hrm_text.model.kernels.tiles import PackedTiles

# T packed tokens, N heads, H head width

Store = Callable[[int, Tensor, Tensor], None]
"""Takes a slot, and the keys and values [T, N, H] of the packed batch in it."""


@dataclass(frozen=True)
class Launch:
    """Sizes of one kernel."""

    own: int
    """Rows of its own tile."""
    other: int
    """Rows of the tiles it walks over."""
    warps: int
    stages: int
    """Depth of the software pipeline."""
    registers: int | None = None
    """Most registers a thread may use; fewer let more programs share a multiprocessor and hide each other's waits."""

    @property
    def options(self) -> dict[str, int | None]:
        """What a launch takes beside its arguments."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True)
class Launches:
    """The three kernels of attention."""

    forward: Launch
    backward_keys: Launch
    backward_queries: Launch


def launches(head_dim: int, element_bytes: int, shared_bytes: int) -> Launches:
    """Sizes by head width, element size and the shared memory of one multiprocessor."""
    if element_bytes == 2 and shared_bytes >= 160 * 1024 and head_dim <= 128:  # as tuned on an H200; A100 and later
        return Launches(Launch(64, 32, 4, 2, 128), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2))
    if element_bytes == 2 and head_dim <= 128:
        return Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 1), Launch(64, 32, 4, 1))
    return Launches(Launch(32, 32, 4, 1), Launch(32, 16, 4, 1), Launch(32, 16, 4, 1))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Shared memory in bytes that one program may use on a device."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def precision_of(x: Tensor) -> str:
    """How the matrix units multiply: exact products in fp32, which is for tests; otherwise it does not matter."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def forward(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, gate_TNH: Tensor | None, tiles: PackedTiles
) -> tuple[Tensor, Tensor]:
    """Attention times sigmoid(gate), if there is a gate: [T, N, H]; and the log-sum-exp in base 2, fp32 [N, T].

    The four share one layout: equal strides, H contiguous. Padding gets zeros.
    """
    tokens, heads, width = q_TNH.shape
    sizes = launches(width, q_TNH.element_size(), shared_memory(q_TNH.device)).forward
    # The padded tail is written by no tile.
    allocate = torch.empty if tiles.filled == tokens else torch.zeros
    y_TNH = allocate(tokens, heads, width, dtype=q_TNH.dtype, device=q_TNH.device)
    lse_NT = torch.empty(heads, tokens, dtype=torch.float32, device=q_TNH.device)
    work = tiles.of(sizes.own, keys=False)
    if len(work):
        attention_forward[(len(work) * heads,)](
            q_TNH, k_TNH, v_TNH, q_TNH if gate_TNH is None else gate_TNH, y_TNH, lse_NT, work, tokens,
            q_TNH.stride(0), q_TNH.stride(1), 1 / math.sqrt(width), heads, width, sizes.own, sizes.other,
            gate_TNH is not None, precision_of(q_TNH), **sizes.options,
        )  # fmt: skip
    return y_TNH, lse_NT


def backward(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    dy_TNH: Tensor,
    lse_NT: Tensor,
    delta_NT: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
    tiles: PackedTiles,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the gradients of q, k and v to ``into``, three [T, N, H] of one layout; padding is not written.

    delta_NT: rowsum(dy * y). With ``rotary`` (cos, sin, fp32 [T, H / 2] each), q and k are what a rotation gave, and
    the gradients are those of what went into it. dy_TNH is contiguous.
    """
    tokens, heads, width = q_TNH.shape
    sizes = launches(width, q_TNH.element_size(), shared_memory(q_TNH.device))
    dq_TNH, dk_TNH, dv_TNH = into
    cos, sin = (lse_NT, lse_NT) if rotary is None else rotary
    shared: tuple[Any, ...] = (
        tokens, q_TNH.stride(0), q_TNH.stride(1), dq_TNH.stride(0), dq_TNH.stride(1), 1 / math.sqrt(width),
        heads, width,
    )  # fmt: skip
    last = (rotary is not None, precision_of(q_TNH))
    for_keys = tiles.of(sizes.backward_keys.own, keys=True)
    if len(for_keys):
        attention_backward_keys[(len(for_keys) * heads,)](
            q_TNH, k_TNH, v_TNH, dy_TNH, dk_TNH, dv_TNH, lse_NT, delta_NT, cos, sin, for_keys, *shared,
            sizes.backward_keys.own, sizes.backward_keys.other, *last,
            **sizes.backward_keys.options,
        )  # fmt: skip
        for_queries = tiles.of(sizes.backward_queries.own, keys=False)
        attention_backward_queries[(len(for_queries) * heads,)](
            q_TNH, k_TNH, v_TNH, dy_TNH, dq_TNH, lse_NT, delta_NT, cos, sin, for_queries, *shared,
            sizes.backward_queries.own, sizes.backward_queries.other, *last,
            **sizes.backward_queries.options,
        )  # fmt: skip


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, tiles: PackedTiles) -> Tensor:
        if not q_TNH.stride() == k_TNH.stride() == v_TNH.stride() or q_TNH.stride(2) != 1:
            q_TNH, k_TNH, v_TNH = (x_TNH.contiguous() for x_TNH in (q_TNH, k_TNH, v_TNH))
        y_TNH, lse_NT = forward(q_TNH, k_TNH, v_TNH, None, tiles)
        ctx.save_for_backward(q_TNH, k_TNH, v_TNH, y_TNH, lse_NT)
        ctx.tiles = tiles
        return y_TNH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TNH, v_TNH, y_TNH, lse_NT = ctx.saved_tensors
        dy_TNH = gradients[0].contiguous()
        delta_NT = (dy_TNH.float() * y_TNH.float()).sum(-1).T.contiguous()
        allocate = torch.empty if ctx.tiles.filled == len(q_TNH) else torch.zeros
        into = allocate(3, *q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        backward(q_TNH, k_TNH, v_TNH, dy_TNH, lse_NT, delta_NT, into.unbind(0), ctx.tiles)  # type: ignore[arg-type]
        return (*into.unbind(0), None)


class TritonAttention:
    """Attention over a packed batch by the kernels above; the cost follows the visible pairs."""

    def __init__(self, spans: Spans, num_tokens: int, device: torch.device, store: Store | None = None) -> None:
        self.tiles = PackedTiles(spans, num_tokens, device)
        self.store = store
        """Is handed the keys and values of every slot: a cache, which wants no gradient."""

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        """Attend within the batch; padding gets zeros."""
        if self.store is not None:
            self.store(slot, k_TNH, v_TNH)
        y_TNH: Tensor = _Attend.apply(q_TNH, k_TNH, v_TNH, self.tiles)
        return y_TNH
