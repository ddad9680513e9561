"""Matrix products in FP8 (e4m3), and what turns tensors into FP8 on their way out of the pass that makes them.

Every scale is a power of two, so that scaling is exact and a tensor can be scaled again, for a product along its other
axis, without being rounded again:

* A normed row has |n| <= sqrt(D) by definition: one constant scale holds it for any input.
* A row of gradients or of the SwiGLU's output is scaled by its own largest value, found in the pass that writes it.
* A weight has one scale; it is turned once an optimizer step, in both layouts, and used by all calls of its stack.

The gradient of a weight sums over tokens, so the scales of its operands' rows cannot stay outside of the product: the
transposed copies, which that product needs in any case, have them multiplied in, relative to the largest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm_text.model.kernels.elementwise import row_warps

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite number of e4m3."""

# T packed tokens, C columns of a matrix, O outputs and I inputs of a weight


class Rows(NamedTuple):
    """A matrix in FP8 whose row t stands for values[t] * inverse[t]."""

    values_TC: Tensor
    inverse_T: Tensor
    """fp32 [T]."""


@triton.jit
def _power_of_two(largest):
    """The power of two that brings ``largest`` just below 448; 1 for zero."""
    return tl.where(largest > 0, tl.exp2(tl.floor(tl.log2(448.0 / tl.maximum(largest, 1e-30)))), 1.0)


@triton.jit
def quantise_rows_kernel(x, y, inverse, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """One row by its own scale."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    x_C = tl.load(x + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    scale = _power_of_two(tl.max(tl.abs(x_C), 0))
    tl.store(y + row * C + c, (x_C * scale).to(y.dtype.element_ty), mask=c < C)
    tl.store(inverse + row, 1 / scale)


@triton.jit
def swiglu_forward_float8(gu, h, inverse, I: tl.constexpr, BLOCK_I: tl.constexpr):  # noqa: E741
    """One row: h = silu(g) * u by its own scale."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    g = tl.load(gu + row * (2 * I) + i, mask=i < I, other=0.0).to(tl.float32)
    u = tl.load(gu + row * (2 * I) + I + i, mask=i < I, other=0.0).to(tl.float32)
    h_I = g * tl.sigmoid(g) * u
    scale = _power_of_two(tl.max(tl.abs(h_I), 0))
    tl.store(h + row * I + i, (h_I * scale).to(h.dtype.element_ty), mask=i < I)
    tl.store(inverse + row, 1 / scale)


@triton.jit
def swiglu_backward_float8(
    gu, dh, dgu, dgu_inverse, h, h_inverse, I: tl.constexpr, BLOCK_I: tl.constexpr, AGAIN: tl.constexpr  # noqa: E741
):  # fmt: skip
    """One row of dgu by its own scale; with AGAIN, h once more."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    g = tl.load(gu + row * (2 * I) + i, mask=i < I, other=0.0).to(tl.float32)
    u = tl.load(gu + row * (2 * I) + I + i, mask=i < I, other=0.0).to(tl.float32)
    d = tl.load(dh + row * I + i, mask=i < I, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    dg = d * u * (sigmoid + silu * (1 - sigmoid))
    du = d * silu
    scale = _power_of_two(tl.maximum(tl.max(tl.abs(dg), 0), tl.max(tl.abs(du), 0)))
    tl.store(dgu + row * (2 * I) + i, (dg * scale).to(dgu.dtype.element_ty), mask=i < I)
    tl.store(dgu + row * (2 * I) + I + i, (du * scale).to(dgu.dtype.element_ty), mask=i < I)
    tl.store(dgu_inverse + row, 1 / scale)
    if AGAIN:
        h_I = silu * u
        h_scale = _power_of_two(tl.max(tl.abs(h_I), 0))
        tl.store(h + row * I + i, (h_I * h_scale).to(h.dtype.element_ty), mask=i < I)
        tl.store(h_inverse + row, 1 / h_scale)


@triton.jit(do_not_specialize=["num_tokens", "padded"])
def quantise_transpose(
    x, inverse, largest, y, num_tokens, padded, C: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [C, padded] = x [T, C] transposed, row t times inverse[t] / largest; zeros behind the last token."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place_TC = t[:, None].to(tl.int64) * C + c[None, :]
    x_TC = tl.load(x + place_TC, mask=(t[:, None] < num_tokens) & (c[None, :] < C), other=0.0)
    if SCALED:
        factor_T = tl.load(inverse + t, mask=t < num_tokens, other=0.0) / tl.load(largest)
        x_TC = (x_TC.to(tl.float32) * factor_T[:, None]).to(y.dtype.element_ty)
    place_CT = c[:, None].to(tl.int64) * padded + t[None, :]
    tl.store(y + place_CT, tl.trans(x_TC), mask=(c[:, None] < C) & (t[None, :] < padded))


@triton.jit
def quantise_weight(
    w, largest, y, y_transposed, inverse_O, inverse_I, O: tl.constexpr, I: tl.constexpr, BLOCK: tl.constexpr  # noqa: E741
):  # fmt: skip
    """A tile of a weight [O, I] by the weight's one scale, as it lies and transposed; and the scale for each row.

    O and I are multiples of BLOCK: masked stores of FP8 tiles left holes at the edges (Triton 3.6).
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = _power_of_two(tl.load(largest).to(tl.float32))
    w_OI = tl.load(w + o[:, None].to(tl.int64) * I + i[None, :]).to(tl.float32) * scale
    w_OI = w_OI.to(y.dtype.element_ty)
    tl.store(y + o[:, None].to(tl.int64) * I + i[None, :], w_OI)
    tl.store(y_transposed + i[:, None].to(tl.int64) * O + o[None, :], tl.trans(w_OI))
    if tl.program_id(1) == 0:
        tl.store(inverse_O + o, tl.zeros([BLOCK], tl.float32) + 1 / scale)
    if tl.program_id(0) == 0:
        tl.store(inverse_I + i, tl.zeros([BLOCK], tl.float32) + 1 / scale)


# --------------------------------------------------------------------------------------------------------- launches ---


TILE, TILE_WARPS = 128, 4
"""Rows and columns that one program transposes."""

MULTIPLE = 64
"""What both sizes of a weight are multiples of."""


def norm_scale(width: int) -> float:
    """The largest power of two that keeps a normed row, whose entries are at most sqrt(width), below 448."""
    return 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(width)))


def _empty_rows(like_TC: Tensor, width: int) -> Rows:
    tokens, device = len(like_TC), like_TC.device
    return Rows(
        torch.empty(tokens, width, dtype=FLOAT8, device=device), torch.empty(tokens, dtype=torch.float32, device=device)
    )


def quantise_rows(x_TC: Tensor) -> Rows:
    """Each row of a contiguous matrix by its own scale."""
    tokens, width = x_TC.shape
    rows = _empty_rows(x_TC, width)
    if tokens:
        block = triton.next_power_of_2(width)
        quantise_rows_kernel[(tokens,)](x_TC, *rows, width, block, num_warps=row_warps(width))
    return rows


def swiglu(gu_TI: Tensor) -> Rows:
    """silu(g) * u of g, u = split(gu [T, 2 I])."""
    tokens, inner = gu_TI.shape[0], gu_TI.shape[1] // 2
    h = _empty_rows(gu_TI, inner)
    if tokens:
        block = triton.next_power_of_2(inner)
        swiglu_forward_float8[(tokens,)](gu_TI, *h, inner, block, num_warps=row_warps(inner))
    return h


def swiglu_gradient(gu_TI: Tensor, dh_TI: Tensor, h: Rows | None) -> tuple[Rows, Rows]:
    """The gradient of gu, and h: the one that was kept, or one made again."""
    tokens, inner = dh_TI.shape
    again = h is None
    dgu, h = _empty_rows(gu_TI, 2 * inner), _empty_rows(dh_TI, inner) if h is None else h
    if tokens:
        block = triton.next_power_of_2(inner)
        swiglu_backward_float8[(tokens,)](gu_TI, dh_TI, *dgu, *h, inner, block, again, num_warps=row_warps(inner))
    return dgu, h


def transposed(rows: Rows, one_scale: bool = False) -> tuple[Tensor, Tensor]:
    """A matrix for a product along its rows: FP8 [C, T rounded up to 16], and the fp32 [] that its values stand for.

    one_scale: all rows have the same.
    """
    values_TC, inverse_T = rows
    tokens, width = values_TC.shape
    padded = -(-tokens // 16) * 16  # the products want rows of whole 16 bytes
    y_CT = torch.empty(width, padded, dtype=FLOAT8, device=values_TC.device)
    largest = inverse_T[0] if one_scale else inverse_T.amax()
    grid = (triton.cdiv(padded, TILE), triton.cdiv(width, TILE))
    quantise_transpose[grid](
        values_TC, inverse_T, largest, y_CT, tokens, padded, width, not one_scale, TILE, num_warps=TILE_WARPS
    )
    return y_CT, largest


def product(x: Rows, weight: Matrix, *, back: bool = False) -> Tensor:
    """x W^T [T, O], or with ``back`` x W [T, I], in bf16."""
    values, inverse = (weight.transposed_IO, weight.inverse_I) if back else (weight.values_OI, weight.inverse_O)
    return torch._scaled_mm(
        x.values_TC,
        values.t(),
        scale_a=x.inverse_T[:, None],
        scale_b=inverse[None, :],
        out_dtype=torch.bfloat16,
        # Adds in fewer bits than fp32: along a row of up to 8,192 numbers no loss showed it (docs/performance.md).
        use_fast_accum=True,
    )


def product_along_rows(dy_OT: tuple[Tensor, Tensor], x_IT: tuple[Tensor, Tensor]) -> Tensor:
    """dy^T x [O, I] in bf16, of two ``transposed`` matrices.

    Adds in fp32: over 12,288 tokens with a mean, the fast way was off by 3 %.
    """
    return torch._scaled_mm(
        dy_OT[0], x_IT[0].t(), scale_a=dy_OT[1], scale_b=x_IT[1], out_dtype=torch.bfloat16, use_fast_accum=False
    )


@dataclass
class Matrix:
    """A weight [O, I] in FP8, in both layouts."""

    values_OI: Tensor
    transposed_IO: Tensor
    inverse_O: Tensor
    """fp32 [O], one number: what the product along the inputs multiplies its columns by."""
    inverse_I: Tensor
    key: tuple[int, int] = (0, -1)
    """Storage and version of the weight that it was made of."""

    @classmethod
    def like(cls, weight_OI: Tensor) -> Matrix:
        """Room for a weight, both of whose sizes are multiples of ``MULTIPLE``."""
        (outputs, inputs), device = weight_OI.shape, weight_OI.device
        assert outputs % MULTIPLE == inputs % MULTIPLE == 0, weight_OI.shape
        return cls(
            torch.empty(outputs, inputs, dtype=FLOAT8, device=device),
            torch.empty(inputs, outputs, dtype=FLOAT8, device=device),
            torch.empty(outputs, dtype=torch.float32, device=device),
            torch.empty(inputs, dtype=torch.float32, device=device),
        )

    @torch.no_grad()
    def follow(self, weight_OI: Tensor) -> None:
        """Become that weight, unless it is unchanged since the last time."""
        key = (weight_OI.data_ptr(), weight_OI._version)
        if key == self.key:
            return
        self.key = key
        outputs, inputs = weight_OI.shape
        largest = torch.linalg.vector_norm(weight_OI, math.inf)
        quantise_weight[(outputs // MULTIPLE, inputs // MULTIPLE)](
            weight_OI, largest, self.values_OI, self.transposed_IO, self.inverse_O, self.inverse_I,
            outputs, inputs, MULTIPLE,
        )  # fmt: skip
