"""What a fused block computes, forward and backward: matrix products and the passes between them, nothing else.

The equations are those of ``block.Block``. What the backward pass reads is chosen here, in multiples of T tokens times
width D (for the SwiGLU's inner width of 8/3 D): both normed inputs 2, gate, q, k, v 4, the gated attention 1, gate-up
5.33, its product 2.67. The inputs of the norms, the attention before its gate and the turning of q and k are not kept:
the backward pass of each is written in what comes out of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hrm_text.model.kernels import elementwise, triton_attention
from hrm_text.model.kernels.tiles import PackedTiles

# T packed tokens, D width, A = N * H heads times head width, I inner width of the SwiGLU


class Weights(NamedTuple):
    """The matrices of a block, as nn.Linear holds them."""

    gqkv_4AD: Tensor
    o_DA: Tensor
    gate_up_2ID: Tensor
    down_DI: Tensor


class Kept(NamedTuple):
    """What the backward pass of a block reads."""

    n1_TD: Tensor
    """The attention's normed input, and 1 / rms of what was normed."""
    rstd1_T: Tensor
    gqkv_T4A: Tensor
    """gate, q, k, v; q and k are turned."""
    z_TA: Tensor
    """The gated attention."""
    lse_NT: Tensor
    n2_TD: Tensor
    rstd2_T: Tensor
    gate_up_T2I: Tensor | None
    h_TI: Tensor | None
    """silu(gate) * up."""


@dataclass(frozen=True)
class Settings:
    """What a block's passes need to know beside tensors."""

    num_heads: int
    head_dim: int
    eps: float
    keep_gate_up: bool
    keep_h: bool
    keep_input_only: bool


def forward(
    x_TD: Tensor, weights: Weights, rotary: tuple[Tensor, Tensor], tiles: PackedTiles, settings: Settings
) -> tuple[Tensor, Kept]:
    """The block's output, and what its backward pass reads. x is left as it is."""
    # The residual stream is a copy, to which the two output products add in place.
    n1_TD, rstd1_T, stream_TD = elementwise.rms_norm(x_TD, settings.eps, copy=True)
    gqkv_T4A = torch.mm(n1_TD, weights.gqkv_4AD.t())
    gate_TNH, q_TNH, k_TNH, v_TNH = heads(gqkv_T4A, settings)
    elementwise.rotate_in_place(q_and_k(gqkv_T4A, settings), rotary)
    z_TNH, lse_NT = triton_attention.forward(q_TNH, k_TNH, v_TNH, gate_TNH, tiles)
    z_TA = z_TNH.flatten(1)
    stream_TD.addmm_(z_TA, weights.o_DA.t())
    n2_TD, rstd2_T, _ = elementwise.rms_norm(stream_TD, settings.eps)
    gate_up_T2I = torch.mm(n2_TD, weights.gate_up_2ID.t())
    h_TI = elementwise.swiglu(gate_up_T2I)
    stream_TD.addmm_(h_TI, weights.down_DI.t())
    kept = Kept(
        n1_TD, rstd1_T, gqkv_T4A, z_TA, lse_NT, n2_TD, rstd2_T,
        gate_up_T2I if settings.keep_gate_up else None, h_TI if settings.keep_h else None,
    )  # fmt: skip
    return stream_TD, kept


def backward(
    dout_TD: Tensor,
    kept: Kept,
    weights: Weights,
    rotary: tuple[Tensor, Tensor],
    tiles: PackedTiles,
    settings: Settings,
    needs_x: bool,
) -> Tensor | None:
    """The gradient of x, if it is asked for; those of the matrices are added to their ``grad``."""
    gate_up_T2I = kept.gate_up_T2I
    if gate_up_T2I is None:
        gate_up_T2I = torch.mm(kept.n2_TD, weights.gate_up_2ID.t())
    dh_TI = torch.mm(dout_TD, weights.down_DI)
    dgate_up_T2I, h_TI = elementwise.swiglu_gradient(gate_up_T2I, dh_TI, kept.h_TI)
    del gate_up_T2I, dh_TI
    add_product_to_grad(weights.down_DI, dout_TD, h_TI)
    del h_TI
    dn2_TD = torch.mm(dgate_up_T2I, weights.gate_up_2ID)
    add_product_to_grad(weights.gate_up_2ID, dgate_up_T2I, kept.n2_TD)
    del dgate_up_T2I
    dstream_TD = elementwise.rms_norm_gradient(dn2_TD, kept.n2_TD, kept.rstd2_T, dout_TD)
    del dn2_TD

    dz_TA = torch.mm(dstream_TD, weights.o_DA)
    add_product_to_grad(weights.o_DA, dstream_TD, kept.z_TA)
    gate_TNH, q_TNH, k_TNH, v_TNH = heads(kept.gqkv_T4A, settings)
    # The padded tail has no tile that would write its gradient.
    allocate = torch.empty_like if tiles.filled == len(dout_TD) else torch.zeros_like
    dgqkv_T4A = allocate(kept.gqkv_T4A)
    dgate_TNH, dq_TNH, dk_TNH, dv_TNH = heads(dgqkv_T4A, settings)
    dy_TNH, delta_NT = elementwise.gate_gradient(
        dz_TA.view_as(gate_TNH), kept.z_TA.view_as(gate_TNH), gate_TNH, dgate_TNH
    )
    del dz_TA
    into = (dq_TNH, dk_TNH, dv_TNH)
    triton_attention.backward(q_TNH, k_TNH, v_TNH, dy_TNH, kept.lse_NT, delta_NT, into, tiles, rotary)
    del dy_TNH
    add_product_to_grad(weights.gqkv_4AD, dgqkv_T4A, kept.n1_TD)
    if not needs_x:
        return None
    dn1_TD = torch.mm(dgqkv_T4A, weights.gqkv_4AD)
    return elementwise.rms_norm_gradient(dn1_TD, kept.n1_TD, kept.rstd1_T, dstream_TD)


def add_product_to_grad(weight_OI: Tensor, dy_TO: Tensor, x_TI: Tensor) -> None:
    """weight.grad += dy^T x, by the product itself.

    A stack is called several times, so autograd would write each gradient and add it up in another pass over all
    weights: 3 ms of an XL step. The product adds as it writes.
    """
    if not weight_OI.requires_grad:
        return
    if weight_OI.grad is None:
        weight_OI.grad = torch.mm(dy_TO.t(), x_TI)
    else:
        weight_OI.grad.addmm_(dy_TO.t(), x_TI)


def heads(gqkv_T4A: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """gate, q, k, v [T, N, H] as views."""
    return gqkv_T4A.view(len(gqkv_T4A), 4, settings.num_heads, settings.head_dim).unbind(1)


def q_and_k(gqkv_T4A: Tensor, settings: Settings) -> Tensor:
    """q and k, which lie side by side, as [T, 2 N, H]."""
    size = settings.num_heads * settings.head_dim
    return gqkv_T4A[:, size : 3 * size].unflatten(1, (2 * settings.num_heads, settings.head_dim))
