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

# B tokens, R rows of W, P parts of the columns, each a warp's. A tile has 4 LANE columns of each part: LANE neighbours
# for each of 4 lanes, beside which a warp has 8 rows (of W, or tokens). A lane reads E of them at once.
#
# What is read is [X, E], where X goes through the 4 and 8 of a warp's lanes, then the P warps, then what a lane has
# besides. That is the order in which Triton deals a dimension out, so that each lane reads what it is to multiply.


@triton.jit
def _rows(X: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Which of 8 N rows each of X is of."""
    x_X = tl.arange(0, X)
    return x_X // (32 * P) % N * 8 + x_X // 4 % 8


@triton.jit
def _read(
    start, row_X, tile, K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr, E: tl.constexpr,
    TAIL: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix with K columns: of 8 N of its rows, all parts; with TAIL zeros beyond the columns."""
    x_X = tl.arange(0, row_X.shape[0])
    k_X = (tile * P + x_X // 32 % P) * (4 * LANE) + x_X % 4 * LANE + x_X // (32 * P * N) * E
    k_XE = k_X[:, None] + tl.arange(0, E)[None, :]
    places = start + row_X[:, None] * K + k_XE
    if TAIL:
        return tl.load(places, mask=k_XE < K, other=0, eviction_policy=EVICTION)
    else:
        return tl.load(places, eviction_policy=EVICTION)


@triton.jit
def _operand(read_XE, P: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr):
    """[P, 8 N, 4 LANE]: columns in the order in which a lane's are those that the tensor core asks it for."""
    E: tl.constexpr = read_XE.shape[1]
    J: tl.constexpr = LANE // 4
    tile = tl.reshape(read_XE, (LANE // E, N, P, 8, 4, E // J, J))
    return tl.reshape(tl.permute(tile, (2, 1, 3, 0, 5, 4, 6)), (P, 8 * N, 4 * LANE))


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
    N_R: tl.constexpr = BLOCK_R // 8
    N_B: tl.constexpr = BLOCK_B // 8
    E: tl.constexpr = min(LANE, 8)  # no more than 16 bytes of x either
    first = tl.program_id(1) * TILES
    r_R = tl.arange(0, BLOCK_R)
    made_M = tl.program_id(0) * MADE + tl.arange(0, MADE)
    row_R = tl.program_id(0) * MADE + r_R % MADE + r_R // MADE * ROWS
    # Where there are no rows and no tokens, the last one's: nothing comes of them.
    r_X = _rows(32 * WARPS * N_R, WARPS, N_R)
    row_X = tl.minimum(tl.program_id(0) * MADE + r_X % MADE, ROWS - 1) + r_X // MADE * ROWS
    tiles = ()
    for i in tl.static_range(AHEAD):
        tiles = tiles + (_read(w, row_X, first + i, K, WARPS, N_R, LANE, LANE, TAIL, "evict_first"),)  # noqa: RUF005
    b_B = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_X = tl.program_id(2) * BLOCK_B + _rows(32 * WARPS * N_B * (LANE // E), WARPS, N_B)
    b_X = tl.minimum(b_X, batch - 1)
    scale_M, upper_scale_M = row_scales(scale, made_M, ROWS, PAIR, SCALED)
    if PDL:
        gdc_wait()

    xs = ()
    for i in tl.static_range(NEAR):
        xs = xs + (_read(x, b_X, first + i, K, WARPS, N_B, LANE, E, TAIL, ""),)  # noqa: RUF005
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
            later = _read(w, row_X, first + i + AHEAD, K, WARPS, N_R, LANE, LANE, TAIL, "evict_first")
            tiles = tiles + (later,)  # noqa: RUF005
        if i + NEAR < TILES:
            xs = xs + (_read(x, b_X, first + i + NEAR, K, WARPS, N_B, LANE, E, TAIL, ""),)  # noqa: RUF005
        w_PRK = _operand(tiles[i].to(x.dtype.element_ty), WARPS, N_R, LANE)
        x_PBK = _operand(xs[i], WARPS, N_B, LANE)
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
