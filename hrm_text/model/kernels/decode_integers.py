"""``decode_linear.decode_vector`` for weights of 8 bits that are never widened.

Made into fp32, an integer weight costs three or four instructions and one more for its product, and that, not the
reading, is then what a step takes. Here x becomes integers instead, once for all rows of a program, and four products
at a time are one instruction (dp4a).

The columns of x that one thread reads, 16 of each tile, share a step: a power of two, 2^-14 of that in which the
largest of them lies. Each is a whole number of steps of 16 bits, cut into a signed byte above and one without a sign
below, and the sums of their products with weights are exact. So x is off by half a step at most, 2^-15 of the largest
of its thread's columns. Nothing of a number of bf16 is lost down to 2^-7 of that largest one, nor of fp16 to 2^-4.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Tuples grow while loops are unrolled:
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hrm_text.model.kernels.decode_linear import swiglu

# R rows of W, K its columns, G groups of columns: of 16 neighbours, which lie in one thread. A word is 4 integers.


@triton.jit
def _weights(w, row_R, tile: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The words [R, K / 4] of the tile of a program's rows that begins at column ``tile * BLOCK_K``.

    Where there are none: beyond the rows the last one's, of which nothing comes, and beyond the columns anything at
    all, as x is zero there. Zeros would be two instructions more for each load.
    """
    word = tile * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
    places = w + tl.minimum(row_R, ROWS - 1)[:, None] * (K // 4) + word[None, :]
    if (tile + 1) * BLOCK_K <= K:
        return tl.load(places, eviction_policy="evict_first")
    else:
        return tl.load(places, mask=(word < K // 4)[None, :], eviction_policy="evict_first")


@triton.jit
def _tokens(x, tile: tl.constexpr, part: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The lower or upper 8 columns of each group of a tile, [G, 8]: as many as a thread reads at once."""
    group_G1 = tl.arange(0, BLOCK_K // 16)[:, None]
    k = tile * BLOCK_K + (group_G1 * 2 + part) * 8 + tl.arange(0, 8)[None, :]
    if (tile + 1) * BLOCK_K <= K:
        return tl.load(x + k)
    else:
        return tl.load(x + k, mask=k < K, other=0.0)


@triton.jit
def _wide(x_G8, DP4A: tl.constexpr):
    """x in fp32: two of bf16 by an instruction each, where Triton's own conversion takes three."""
    if DP4A and x_G8.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=&r,=r,r",
            [x_G8],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x_G8.to(tl.float32)


@triton.jit
def _larger(a, b, DP4A: tl.constexpr, PDL: tl.constexpr):
    """The larger magnitude of each two, with any sign. What is not a number is the largest of all.

    PDL: the GPU is of capability 9.0 or more; magnitudes need no instruction of their own from 8.6 on.
    """
    if DP4A and b.dtype == tl.bfloat16:  # two at once
        return tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;"
            if PDL
            else """
            {
                .reg .b32 c, d;
                and.b32 c, $1, 0x7FFF7FFF;
                and.b32 d, $2, 0x7FFF7FFF;
                max.NaN.bf16x2 $0, c, d;
            }
            """,
            "=r,r,r",
            [a, b],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        a, b = tl.abs(a.to(tl.float32)), tl.abs(b.to(tl.float32))
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _halves(x_GN):
    """The first and the last half of the columns of each group."""
    G: tl.constexpr = x_GN.shape[0]
    return tl.split(tl.permute(tl.reshape(x_GN, (G, 2, x_GN.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _exponents(largest_G8, DP4A: tl.constexpr, PDL: tl.constexpr):
    """As numbers of fp32, bits and all: the power of two [G] below each group's largest magnitude.

    Rounded up where 2^15 steps would come of it, infinite for what is not finite, and at least 2^-112, so that both
    the step and its inverse are normal numbers.
    """
    first_G4, last_G4 = _halves(largest_G8)
    first_G2, last_G2 = _halves(_larger(first_G4, last_G4, DP4A, PDL))
    largest_G2 = _larger(first_G2, last_G2, DP4A, PDL).to(tl.float32)
    # Without a sign, floats are ordered as their bits are.
    bits_G = tl.max(largest_G2.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    bits_G = (tl.minimum(bits_G, 0x7F800000) + 0x100) & 0x7F800000
    return tl.maximum(bits_G, 15 << 23)


@triton.jit
def _bytes(x_G8, steps_G, DP4A: tl.constexpr):
    """x in steps, two words [G] of upper bytes and two of lower ones. steps: how many make one."""
    # The sum's low bits are the integer: 1.5 * 2^23 has none, and is so large that a sum is rounded to integers.
    v_G8 = x_G8 * steps_G[:, None] + 12582912.0
    even_G4, odd_G4 = tl.split(tl.reshape(v_G8, (v_G8.shape[0], 4, 2)))
    v0_G2, v2_G2 = tl.split(tl.reshape(even_G4, (v_G8.shape[0], 2, 2)))
    v1_G2, v3_G2 = tl.split(tl.reshape(odd_G4, (v_G8.shape[0], 2, 2)))
    if DP4A:
        low_G2, high_G2 = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 front, back;
                prmt.b32 front, $2, $3, 0x5140;
                prmt.b32 back, $4, $5, 0x5140;
                prmt.b32 $0, front, back, 0x5410;
                prmt.b32 $1, front, back, 0x7632;
            }
            """,
            "=r,=r,r,r,r,r",
            [v0_G2, v1_G2, v2_G2, v3_G2],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low_G2 = tl.zeros_like(v0_G2).to(tl.int32)
        high_G2 = low_G2
        values = (v0_G2, v1_G2, v2_G2, v3_G2)
        for j in tl.static_range(4):
            bits_G2 = values[j].to(tl.int32, bitcast=True)
            low_G2 |= (bits_G2 & 255) << (8 * j)
            high_G2 |= ((bits_G2 >> 8) & 255) << (8 * j)
    high0_G, high1_G = tl.split(high_G2)
    low0_G, low1_G = tl.split(low_G2)
    return high0_G, high1_G, low0_G, low1_G


@triton.jit
def _words(w_RK):
    """The four words [R, G] of each group."""
    R: tl.constexpr = w_RK.shape[0]
    G: tl.constexpr = w_RK.shape[1] // 4
    even_RG2, odd_RG2 = tl.split(tl.reshape(w_RK, (R, G, 2, 2)))
    w0_RG, w2_RG = tl.split(even_RG2)
    w1_RG, w3_RG = tl.split(odd_RG2)
    return w0_RG, w1_RG, w2_RG, w3_RG


@triton.jit
def _plus(sum_RG, w_RG, x_G, SIGNED: tl.constexpr, DP4A: tl.constexpr):
    """sum + the four products of a word of W and one of x, whose bytes have a sign or not."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;" if SIGNED else "dp4a.s32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [w_RG, x_G[None, :], sum_RG],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for j in tl.static_range(4):
            x_byte_G = (x_G << (24 - 8 * j)) >> 24
            if not SIGNED:
                x_byte_G &= 255
            sum_RG += ((w_RG << (24 - 8 * j)) >> 24) * x_byte_G[None, :]
        return sum_RG


@triton.jit
def decode_vector_int8(
    x,
    w,
    scale,
    out,
    eps,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DP4A: tl.constexpr,
    PDL: tl.constexpr,
):
    """As ``decode_vector``, of int32 words w [ROWS, K / 4] (PAIR: [2 ROWS, K / 4]) and a scale for each row.

    DP4A: by the instruction of NVIDIA's GPUs; the same integers come of it as without.
    """
    if PDL:
        gdc_launch_dependents()
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    G: tl.constexpr = BLOCK_K // 16
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tiles, upper = (), ()
    for i in tl.static_range(AHEAD):
        tiles = tiles + (_weights(w, row_R, i, ROWS, K, BLOCK_K),)  # noqa: RUF005
        if PAIR:
            upper = upper + (_weights(w + ROWS * (K // 4), row_R, i, ROWS, K, BLOCK_K),)  # noqa: RUF005
    inside = row_R < ROWS
    scale_R = tl.load(scale + row_R, mask=inside, other=0.0)
    if PAIR:
        upper_scale_R = tl.load(scale + ROWS + row_R, mask=inside, other=0.0)
    if PDL:
        gdc_wait()

    # All that is read, first: then its latency counts once.
    xs, residuals = (), ()
    for i in tl.static_range(BATCH * TILES * 2):
        xs = xs + (_tokens(x + i // (TILES * 2) * K, i // 2 % TILES, i % 2, K, BLOCK_K),)  # noqa: RUF005
    if RESIDUAL:
        for b in tl.static_range(BATCH):
            residuals = residuals + (tl.load(out + b * ROWS + row_R, mask=inside, other=0.0),)  # noqa: RUF005

    # A text's 8 words for each tile: of the lower columns 2 of upper bytes and 2 of lower, then of the upper columns.
    words, steps, squares = (), (), ()
    for b in tl.static_range(BATCH):
        largest_G8 = xs[b * TILES * 2]
        for i in tl.static_range(1, TILES * 2):
            largest_G8 = _larger(largest_G8, xs[b * TILES * 2 + i], DP4A, PDL)
        exponent_G = _exponents(largest_G8, DP4A, PDL)
        steps = steps + (exponent_G.to(tl.float32, bitcast=True) * (2.0**-14),)  # noqa: RUF005
        inverse_G = ((127 << 23) + ((127 + 14 << 23) - exponent_G)).to(tl.float32, bitcast=True)
        squares_G8 = tl.zeros([G, 8], tl.float32)
        for i in tl.static_range(TILES * 2):
            x_G8 = _wide(xs[b * TILES * 2 + i], DP4A)
            words = words + _bytes(x_G8, inverse_G, DP4A)
            if NORM:
                squares_G8 += x_G8 * x_G8
        squares = squares + (tl.sum(squares_G8, 1),)  # noqa: RUF005

    highs, lows, upper_highs, upper_lows = (), (), (), ()
    for _ in tl.static_range(BATCH):
        zero = (tl.zeros([BLOCK_R, G], tl.int32),)
        highs, lows, upper_highs, upper_lows = highs + zero, lows + zero, upper_highs + zero, upper_lows + zero
    for i in tl.static_range(TILES):
        if i + AHEAD < TILES:
            tiles = tiles + (_weights(w, row_R, i + AHEAD, ROWS, K, BLOCK_K),)  # noqa: RUF005
            if PAIR:
                upper = upper + (_weights(w + ROWS * (K // 4), row_R, i + AHEAD, ROWS, K, BLOCK_K),)  # noqa: RUF005
        tile = _words(tiles[i])
        if PAIR:
            upper_tile = _words(upper[i])
        next_highs, next_lows, next_upper_highs, next_upper_lows = (), (), (), ()
        for b in tl.static_range(BATCH):
            high_RG, low_RG, upper_high_RG, upper_low_RG = highs[b], lows[b], upper_highs[b], upper_lows[b]
            for j in tl.static_range(4):
                high_G = words[(b * TILES + i) * 8 + j // 2 * 4 + j % 2]
                low_G = words[(b * TILES + i) * 8 + j // 2 * 4 + 2 + j % 2]
                high_RG = _plus(high_RG, tile[j], high_G, True, DP4A)
                low_RG = _plus(low_RG, tile[j], low_G, False, DP4A)
                if PAIR:
                    upper_high_RG = _plus(upper_high_RG, upper_tile[j], high_G, True, DP4A)
                    upper_low_RG = _plus(upper_low_RG, upper_tile[j], low_G, False, DP4A)
            next_highs, next_lows = next_highs + (high_RG,), next_lows + (low_RG,)  # noqa: RUF005
            next_upper_highs = next_upper_highs + (upper_high_RG,)  # noqa: RUF005
            next_upper_lows = next_upper_lows + (upper_low_RG,)  # noqa: RUF005
        highs, lows, upper_highs, upper_lows = next_highs, next_lows, next_upper_highs, next_upper_lows

    for b in tl.static_range(BATCH):
        y_R = _total(highs[b], lows[b], steps[b]) * scale_R
        rstd = 1.0
        if NORM:
            rstd = 1 / tl.sqrt_rn(tl.sum(squares[b], 0) / K + eps)
            y_R *= rstd
        if PAIR:
            y_R = swiglu(y_R, _total(upper_highs[b], upper_lows[b], steps[b]) * upper_scale_R * rstd)
        if RESIDUAL:
            y_R += residuals[b].to(tl.float32)
        tl.store(out + b * ROWS + row_R, y_R.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _total(high_RG, low_RG, step_G):
    """The sum of all groups, in fp32; each group's is exact to the last: it fits in 24 bits twice."""
    return tl.sum((high_RG.to(tl.float32) * 256 + low_RG.to(tl.float32)) * step_G[None, :], 1)
