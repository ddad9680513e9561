"""The passes of a fused block with FP8 products: see ``passes`` for the equations and ``float8`` for the scales.

The products on the attention's normed input, the MLP's and their gradients are FP8. The output projection of attention
stays bf16: it is a fifteenth of the work, its product adds to the residual stream in place, and turning its operands
into FP8 would cost what it saves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from hrm_text.model.kernels import elementwise, float8, triton_attention
from hrm_text.model.kernels.float8 import FLOAT8, Matrix, Rows
from hrm_text.model.kernels.passes import Settings, Weights, add_product_to_grad, heads, q_and_k
from hrm_text.model.kernels.tiles import PackedTiles

# T packed tokens, D width, A = N * H heads times head width, I inner width of the SwiGLU


class Kept(NamedTuple):
    """What the backward pass of a block reads."""

    n1_TD: Tensor
    """FP8; the attention's normed input."""
    rstd1_T: Tensor
    gqkv_T4A: Tensor
    z_TA: Tensor
    """The gated attention."""
    lse_NT: Tensor
    n2_TD: Tensor
    """FP8; the MLP's normed input."""
    rstd2_T: Tensor
    gate_up_T2I: Tensor | None
    h_TI: Tensor | None
    """FP8; silu(gate) * up."""
    h_inverse_T: Tensor | None


class Matrices:
    """The FP8 forms of a block's weights, made anew when a weight has changed."""

    def __init__(self, weights: Weights) -> None:
        self.gqkv, self.gate_up, self.down = (
            Matrix.like(weight) for weight in (weights.gqkv_4AD, weights.gate_up_2ID, weights.down_DI)
        )

    def follow(self, weights: Weights) -> None:
        """Become these weights."""
        self.gqkv.follow(weights.gqkv_4AD)
        self.gate_up.follow(weights.gate_up_2ID)
        self.down.follow(weights.down_DI)


def normed_rows(n_TD: Tensor) -> Rows:
    """Normed rows with their constant scale."""
    return Rows(n_TD, constant_column(len(n_TD), 1 / float8.norm_scale(n_TD.shape[1]), n_TD.device))


@functools.lru_cache(maxsize=4)  # a step asks for the same few
def constant_column(length: int, value: float, device: torch.device) -> Tensor:
    """One number for every row."""
    return torch.full((length,), value, device=device)


def forward(
    x_TD: Tensor,
    weights: Weights,
    matrices: Matrices,
    rotary: tuple[Tensor, Tensor],
    tiles: PackedTiles,
    settings: Settings,
) -> tuple[Tensor, Kept]:
    """The block's output, and what its backward pass reads. x is left as it is."""
    scale = float8.norm_scale(x_TD.shape[1])
    n1_TD, rstd1_T, stream_TD = elementwise.rms_norm(x_TD, settings.eps, copy=True, dtype=FLOAT8, scale=scale)
    gqkv_T4A = float8.product(normed_rows(n1_TD), matrices.gqkv)
    gate_TNH, q_TNH, k_TNH, v_TNH = heads(gqkv_T4A, settings)
    elementwise.rotate_in_place(q_and_k(gqkv_T4A, settings), rotary)
    z_TNH, lse_NT = triton_attention.forward(q_TNH, k_TNH, v_TNH, gate_TNH, tiles)
    z_TA = z_TNH.flatten(1)
    stream_TD.addmm_(z_TA, weights.o_DA.t())
    n2_TD, rstd2_T, _ = elementwise.rms_norm(stream_TD, settings.eps, dtype=FLOAT8, scale=scale)
    gate_up_T2I = float8.product(normed_rows(n2_TD), matrices.gate_up)
    h = float8.swiglu(gate_up_T2I)
    stream_TD.add_(float8.product(h, matrices.down))
    kept = Kept(
        n1_TD, rstd1_T, gqkv_T4A, z_TA, lse_NT, n2_TD, rstd2_T,
        gate_up_T2I if settings.keep_gate_up else None, *(h if settings.keep_h else (None, None)),
    )  # fmt: skip
    return stream_TD, kept


def backward(
    dout_TD: Tensor,
    kept: Kept,
    weights: Weights,
    matrices: Matrices,
    rotary: tuple[Tensor, Tensor],
    tiles: PackedTiles,
    settings: Settings,
    needs_x: bool,
) -> Tensor | None:
    """The gradient of x, if it is asked for; those of the matrices are added to their ``grad``."""
    scale = float8.norm_scale(dout_TD.shape[1])
    n1, n2 = normed_rows(kept.n1_TD), normed_rows(kept.n2_TD)
    gate_up_T2I = kept.gate_up_T2I
    if gate_up_T2I is None:
        gate_up_T2I = float8.product(n2, matrices.gate_up)
    dout = float8.quantise_rows(dout_TD)
    dh_TI = float8.product(dout, matrices.down, back=True)
    h = None if kept.h_TI is None or kept.h_inverse_T is None else Rows(kept.h_TI, kept.h_inverse_T)
    dgate_up, h = float8.swiglu_gradient(gate_up_T2I, dh_TI, h)
    del gate_up_T2I, dh_TI
    add_float8_product_to_grad(weights.down_DI, dout, h)
    del dout, h
    dn2_TD = float8.product(dgate_up, matrices.gate_up, back=True)
    add_float8_product_to_grad(weights.gate_up_2ID, dgate_up, n2, one_scale=True)
    del dgate_up
    dstream_TD = elementwise.rms_norm_gradient(dn2_TD, kept.n2_TD, kept.rstd2_T, dout_TD, scale=scale)
    del dn2_TD

    dz_TA = torch.mm(dstream_TD, weights.o_DA)
    add_product_to_grad(weights.o_DA, dstream_TD, kept.z_TA)
    gate_TNH, q_TNH, k_TNH, v_TNH = heads(kept.gqkv_T4A, settings)
    allocate = torch.empty_like if tiles.filled == len(dout_TD) else torch.zeros_like
    dgqkv_T4A = allocate(kept.gqkv_T4A)
    dgate_TNH, dq_TNH, dk_TNH, dv_TNH = heads(dgqkv_T4A, settings)
    z_TNH = kept.z_TA.view_as(gate_TNH)
    dy_TNH, delta_NT = elementwise.gate_gradient(dz_TA.view_as(gate_TNH), z_TNH, gate_TNH, dgate_TNH)
    del dz_TA
    into = (dq_TNH, dk_TNH, dv_TNH)
    triton_attention.backward(q_TNH, k_TNH, v_TNH, dy_TNH, kept.lse_NT, delta_NT, into, tiles, rotary)
    del dy_TNH
    dgqkv = float8.quantise_rows(dgqkv_T4A)
    del dgqkv_T4A
    add_float8_product_to_grad(weights.gqkv_4AD, dgqkv, n1, one_scale=True)
    if not needs_x:
        return None
    dn1_TD = float8.product(dgqkv, matrices.gqkv, back=True)
    return elementwise.rms_norm_gradient(dn1_TD, kept.n1_TD, kept.rstd1_T, dstream_TD, scale=scale)


def add_float8_product_to_grad(weight_OI: Tensor, dy: Rows, x: Rows, one_scale: bool = False) -> None:
    """weight.grad += dy^T x; ``one_scale``: all rows of x have the same."""
    if not weight_OI.requires_grad:
        return
    gradient_OI = float8.product_along_rows(float8.transposed(dy), float8.transposed(x, one_scale))
    if weight_OI.grad is None:
        weight_OI.grad = gradient_OI.to(weight_OI.dtype)
    else:
        weight_OI.grad.add_(gradient_OI)
