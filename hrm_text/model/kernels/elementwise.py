"""The passes of a block between its matrix products, in Triton: each reads and writes its tensors once.

All compute in fp32 and store in the dtype of their output.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# T packed tokens, D width, N heads, H head width, I inner width of the SwiGLU


@triton.jit
def rms_norm_forward(
    x, y, rstd, copy, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, COPY: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """One row: y = SCALE * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps); with COPY, x is written to ``copy`` as well."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x_D = tl.load(x + row * D + d, mask=inside, other=0.0)
    wide_D = x_D.to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(wide_D * wide_D, 0) / D + eps)
    tl.store(y + row * D + d, (wide_D * (scale * SCALE)).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)
    if COPY:
        tl.store(copy + row * D + d, x_D, mask=inside)


@triton.jit
def rms_norm_backward(
    dy, y, rstd, residual, dx, D: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """One row: dx = rstd * (dy - y * mean(dy * y)), plus the gradient that came past the norm; y lies SCALE times."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    dy_D = tl.load(dy + row * D + d, mask=inside, other=0.0).to(tl.float32)
    y_D = tl.load(y + row * D + d, mask=inside, other=0.0).to(tl.float32) * (1 / SCALE)
    dx_D = tl.load(rstd + row) * (dy_D - y_D * (tl.sum(dy_D * y_D, 0) / D))
    if RESIDUAL:
        dx_D += tl.load(residual + row * D + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * D + d, dx_D.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def rotary_forward(
    x, cos, sin, num_tokens, token_stride, NUM_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Turn all heads of a block of tokens by the angle of each, in place; the angles are read once for all heads."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    half = tl.arange(0, HALF)
    inside = t[:, None] < num_tokens
    angle = t[:, None] * HALF + half[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    for head in range(NUM_HEADS):
        place = x + t[:, None] * token_stride + head * (2 * HALF) + half[None, :]
        first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, (first * c - second * s).to(x.dtype.element_ty), mask=inside)
        tl.store(place + HALF, (second * c + first * s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_forward(gu, h, I: tl.constexpr, BLOCK_I: tl.constexpr):  # noqa: E741
    """A piece of one row: h = silu(g) * u, with g and u the halves of a row of gu."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < I
    g = tl.load(gu + row * (2 * I) + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gu + row * (2 * I) + I + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * I + i, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(gu, dh, dgu, h, I: tl.constexpr, BLOCK_I: tl.constexpr, AGAIN: tl.constexpr):  # noqa: E741
    """A piece of one row of dgu; with AGAIN, h is made again on the way, for the gradient of the matrix behind it."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < I
    g = tl.load(gu + row * (2 * I) + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gu + row * (2 * I) + I + i, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * I + i, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(dgu + row * (2 * I) + i, (d * u * (sigmoid + silu * (1 - sigmoid))).to(dgu.dtype.element_ty), mask=inside)
    tl.store(dgu + row * (2 * I) + I + i, (d * silu).to(dgu.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(h + row * I + i, (silu * u).to(h.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_backward(
    dz, z, gate, dgate, dy, delta, num_tokens, gate_stride, N: tl.constexpr, H: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Backward of z = sigmoid(gate) * y for one head of a block of tokens, from z alone: y itself is not kept.

    dgate = dz * y * sigmoid' = dz * z * (1 - sigmoid(gate)); and delta = rowsum(dy * y) = rowsum(dz * z).
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    head = tl.program_id(1)
    h = tl.arange(0, H)
    inside = t[:, None] < num_tokens
    here = t[:, None] * (N * H) + head * H + h[None, :]
    dz_TH = tl.load(dz + here, mask=inside, other=0.0).to(tl.float32)
    z_TH = tl.load(z + here, mask=inside, other=0.0).to(tl.float32)
    there = t[:, None] * gate_stride + head * H + h[None, :]
    sigmoid = tl.sigmoid(tl.load(gate + there, mask=inside, other=0.0).to(tl.float32))
    product = dz_TH * z_TH
    tl.store(dgate + there, (product * (1 - sigmoid)).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dy + here, (dz_TH * sigmoid).to(dy.dtype.element_ty), mask=inside)
    tl.store(delta + head.to(tl.int64) * num_tokens + t, tl.sum(product, 1), mask=t < num_tokens)


# --------------------------------------------------------------------------------------------------------- launches ---

PIECE = 1024
"""Elements of a row that one program of the SwiGLU works on."""

ROW_SHARE = 1024
"""Elements of a row that one warp holds."""

ROTARY_TOKENS = 8
"""Tokens whose heads one program turns."""


def row_warps(width: int) -> int:
    """Warps for a program that holds a whole row."""
    return max(1, min(16, triton.next_power_of_2(width) // ROW_SHARE))


def rms_norm(
    x_TD: Tensor, eps: float, *, copy: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale`` times the normed rows, 1 / rms of each in fp32 [T], and a copy of x, or x itself where none is wanted.

    dtype: of the normed rows; that of x if not given.
    """
    x_TD = x_TD.contiguous()
    tokens, width = x_TD.shape
    y_TD = torch.empty_like(x_TD, dtype=dtype or x_TD.dtype)
    rstd_T = torch.empty(tokens, dtype=torch.float32, device=x_TD.device)
    copied_TD = torch.empty_like(x_TD) if copy else x_TD
    if tokens:
        rms_norm_forward[(tokens,)](
            x_TD, y_TD, rstd_T, copied_TD, eps, width, triton.next_power_of_2(width), copy, scale,
            num_warps=row_warps(width),
        )  # fmt: skip
    return y_TD, rstd_T, copied_TD


def rms_norm_gradient(
    dy_TD: Tensor, y_TD: Tensor, rstd_T: Tensor, residual_TD: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """The gradient of what was normed to y / scale, plus ``residual_TD``, in the dtype of dy."""
    dx_TD = torch.empty_like(dy_TD)
    tokens, width = dy_TD.shape
    if tokens:
        rms_norm_backward[(tokens,)](
            dy_TD, y_TD, rstd_T, dy_TD if residual_TD is None else residual_TD, dx_TD, width,
            triton.next_power_of_2(width), residual_TD is not None, scale, num_warps=row_warps(width),
        )  # fmt: skip
    return dx_TD


def rotate_in_place(x_TNH: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
    """Turn N heads that lie side by side by their tokens' angles; cos and sin are fp32 [T, H / 2]."""
    tokens, heads, width = x_TNH.shape
    if tokens:
        grid = (triton.cdiv(tokens, ROTARY_TOKENS),)
        rotary_forward[grid](x_TNH, *rotary, tokens, x_TNH.stride(0), heads, width // 2, ROTARY_TOKENS)


def swiglu(gu_TI: Tensor) -> Tensor:
    """silu(g) * u [T, I] of g, u = split(gu [T, 2 I])."""
    tokens, inner = gu_TI.shape[0], gu_TI.shape[1] // 2
    h_TI = gu_TI.new_empty(tokens, inner)
    if tokens:
        swiglu_forward[(tokens, triton.cdiv(inner, PIECE))](gu_TI, h_TI, inner, PIECE)
    return h_TI


def swiglu_gradient(gu_TI: Tensor, dh_TI: Tensor, h_TI: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient of gu, and h: the one that was kept, or one made again."""
    tokens, inner = dh_TI.shape
    dgu_TI = torch.empty_like(gu_TI)
    again = h_TI is None
    h_TI = torch.empty_like(dh_TI) if h_TI is None else h_TI
    if tokens:
        swiglu_backward[(tokens, triton.cdiv(inner, PIECE))](gu_TI, dh_TI, dgu_TI, h_TI, inner, PIECE, again)
    return dgu_TI, h_TI


def gate_gradient(dz_TNH: Tensor, z_TNH: Tensor, gate_TNH: Tensor, dgate_TNH: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gate's gradient; return the attention's, dy [T, N, H], and delta = rowsum(dy * y), fp32 [N, T]."""
    tokens, heads, width = z_TNH.shape
    dy_TNH = torch.empty_like(z_TNH)
    delta_NT = torch.empty(heads, tokens, dtype=torch.float32, device=z_TNH.device)
    if tokens:
        block = 32
        gate_backward[(triton.cdiv(tokens, block), heads)](
            dz_TNH, z_TNH, gate_TNH, dgate_TNH, dy_TNH, delta_NT, tokens, gate_TNH.stride(0), heads, width, block
        )
    return dy_TNH, delta_NT
