"""``decode_linear.decode_matrix`` with weights that go from memory straight to the registers beside the tensor cores.

Made for 8-bit weights and few tokens. Integers have to come to registers to be widened, so the way through shared
memory only costs them time; here every warp has its own share of the columns, and asks for tiles of them before the
wait for x, as ``decode_vector`` does.

A tensor core wants of each lane two neighbouring columns here and two there, which would be loads of a few bytes. But
a sum has no order: a lane loads 16 bytes of a row of W, calls them the columns that the unit expects of it, and does
the same with x. Nothing then moves between lanes or through shared memory, but for the sums of the warps at the end.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Tuples grow while loops are unrolled:
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hrm_text.model.kernels.decode_linear import read_beside, reciprocal_rms, row_scales, write_product

# B tokens, R rows of W, P parts of the columns, each a warp's, K columns of a part in a tile: LANE neighbours for each
# of 4 lanes, beside which the warp has 8 rows or tokens. Loads have their dimensions in the order in which the compiler
# gives them out: of the last one 16 bytes to a lane, then from the first on lanes, warps, registers.


@triton.jit
def _weights(w, row_R, tile, K: tl.constexpr, P: tl.constexpr, LANE: tl.constexpr, TAIL: tl.constexpr):
    """A tile of W as [8, P, R / 8, 4 LANE]; zeros beyond the columns."""
    R: tl.constexpr = row_R.shape[0]
    row_8N = tl.trans(tl.reshape(row_R, (R // 8, 8)))
    k_PL = (tile * P + tl.arange(0, P)[:, None]) * (4 * LANE) + tl.arange(0, 4 * LANE)[None, :]
    places = w + row_8N[:, None, :, None] * K + k_PL[None, :, None, :]
    if TAIL:
        return tl.load(places, mask=(k_PL < K)[None, :, None, :], other=0, eviction_policy="evict_first")
    else:
        return tl.load(places, eviction_policy="evict_first")


@triton.jit
def _tokens(x, b_B, tile, K: tl.constexpr, P: tl.constexpr, LANE: tl.constexpr, TAIL: tl.constexpr):
    """The columns of x that a tile of W has, as [4, 8, P, B / 8, LANE / E, E]: no more than 16 bytes at once."""
    E: tl.constexpr = min(LANE, 8)
    N: tl.constexpr = b_B.shape[0] // 8
    b_8N = tl.trans(tl.reshape(b_B, (N, 8)))
    p_P = (tile * P + tl.arange(0, P))[None, :, None, None] * (4 * LANE)
    h_H = tl.arange(0, LANE // E)[None, None, :, None] * E
    k_4PHE = tl.arange(0, 4)[:, None, None, None] * LANE + p_P + h_H + tl.arange(0, E)[None, None, None, :]
    places = x + b_8N[None, :, None, :, None, None] * K + k_4PHE[:, None, :, None, :, :]
    if TAIL:
        return tl.load(places, mask=(k_4PHE < K)[:, None, :, None, :, :], other=0.0)
    else:
        return tl.load(places)


@triton.jit
def _weight_operand(w):
    """[P, R, K]: columns in the order in which a lane's are those the tensor core asks it for."""
    P: tl.constexpr = w.shape[1]
    N: tl.constexpr = w.shape[2]
    K: tl.constexpr = w.shape[3]
    J: tl.constexpr = K // 16
    w = tl.reshape(w, (8, P, N, 4, 4, J))
    return tl.reshape(tl.permute(w, (1, 2, 0, 4, 3, 5)), (P, N * 8, K))


@triton.jit
def _token_operand(x):
    """[P, B, K], in the same order."""
    P: tl.constexpr = x.shape[2]
    N: tl.constexpr = x.shape[3]
    H: tl.constexpr = x.shape[4]
    E: tl.constexpr = x.shape[5]
    J: tl.constexpr = H * E // 4
    x = tl.reshape(x, (4, 8, P, N, H, E // J, J))
    return tl.reshape(tl.permute(x, (2, 3, 1, 4, 5, 0, 6)), (P, N * 8, H * E * 4))


@triton.jit(do_not_specialize=["batch"])
def decode_fragments(
    x,
    w,
    scale,
    squares,
    out,
    squares_out,
    parts,
    arrived,
    batch,
    eps,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    LANE: tl.constexpr,
    WARPS: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    NEAR: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """As ``decode_matrix``. LANE: columns of W in 16 bytes. AHEAD: tiles of W that are under way, from before the wait
    on, and NEAR: those of x.
    """
    if PDL:
        gdc_launch_dependents()
    WIDTH: tl.constexpr = WARPS * 4 * LANE
    TILES: tl.constexpr = (K + SPLITS * WIDTH - 1) // (SPLITS * WIDTH)
    TAIL: tl.constexpr = SPLITS * TILES * WIDTH != K
    MADE: tl.constexpr = BLOCK_R // 2 if PAIR else BLOCK_R
    first = tl.program_id(1) * TILES
    r_R = tl.arange(0, BLOCK_R)
    made_M = tl.program_id(0) * MADE + tl.arange(0, MADE)
    # Where there are no rows and no tokens, the last one's: nothing comes of them.
    row_R = tl.minimum(tl.program_id(0) * MADE + r_R % MADE, ROWS - 1)
    if PAIR:
        row_R += r_R // MADE * ROWS
    tiles = ()
    for i in tl.static_range(AHEAD):
        tiles = tiles + (_weights(w, row_R, first + i, K, WARPS, LANE, TAIL),)  # noqa: RUF005
    b_B = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    there_B = tl.minimum(b_B, batch - 1)
    scale_M, upper_scale_M = row_scales(scale, made_M, ROWS, PAIR, SCALED)
    if PDL:
        gdc_wait()

    xs = ()
    for i in tl.static_range(NEAR):
        xs = xs + (_tokens(x, there_B, first + i, K, WARPS, LANE, TAIL),)  # noqa: RUF005
    residual_MB, squares_SB = read_beside(
        out, squares, made_M, b_B, batch, ROWS, SQUARES, BLOCK_S, NORM, RESIDUAL
    )  # fmt: skip
    rstd_B = reciprocal_rms(squares_SB, eps, K, NORM)  # while x is on its way
    rstd_B = tl.where(b_B < batch, rstd_B, 0.0)  # the squares of no token are zero, and nothing should come of them
    # The unit takes 16 rows of its first operand and 8 of the second.
    TOKENS_FIRST: tl.constexpr = BLOCK_B >= 16
    acc = tl.zeros([WARPS, BLOCK_B, BLOCK_R] if TOKENS_FIRST else [WARPS, BLOCK_R, BLOCK_B], tl.float32)
    for i in tl.static_range(TILES):
        if i + AHEAD < TILES:
            tiles = tiles + (_weights(w, row_R, first + i + AHEAD, K, WARPS, LANE, TAIL),)  # noqa: RUF005
        if i + NEAR < TILES:
            xs = xs + (_tokens(x, there_B, first + i + NEAR, K, WARPS, LANE, TAIL),)  # noqa: RUF005
        w_PRK, x_PBK = _weight_operand(tiles[i].to(x.dtype.element_ty)), _token_operand(xs[i])
        if TOKENS_FIRST:
            acc = tl.dot(x_PBK, tl.permute(w_PRK, (0, 2, 1)), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(w_PRK, tl.permute(x_PBK, (0, 2, 1)), acc, input_precision=PRECISION)
    acc_RB = tl.sum(acc, 0)
    if TOKENS_FIRST:
        acc_RB = tl.trans(acc_RB)
    write_product(
        acc_RB, residual_MB, rstd_B, scale_M, upper_scale_M, row_R, made_M, b_B,
        out, squares_out, parts, arrived, batch, ROWS, SPLITS, NORM, PAIR, RESIDUAL, SCALED,
    )  # fmt: skip
