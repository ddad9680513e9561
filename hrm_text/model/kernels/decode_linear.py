"""The matrix products of one decoding step in Triton: few tokens, so a product is the reading of its weights.

Three forms compute the same four products of a block (``norm(x) W^T``, ``silu(g) * u`` of two halves of rows, and a
product that is added to the residual stream), each rounding once, at its end:

* ``decode_vector``: a program keeps its rows of W in registers and multiplies on the CUDA cores. Many small programs
  have all of a matrix in flight at once; made for one or two tokens. ``decode_integers`` has one for 8-bit weights.
* ``decode_matrix``: tiles of W flow through shared memory to the tensor cores; K may be split over programs, whose
  last to arrive adds the parts in a fixed order.
* ``decode_fragments.decode_fragments``: tensor cores without shared memory, for weights of 8 bits.

With PDL, programmatic dependent launch (capability 9.0 and later), a kernel lets the next one start at once, reads
weights, which nobody writes, while the kernel before it still runs, and touches everything else only once that one is
done: ``gdc_wait``. Every kernel behind a step's first waits, or "the one before is done" would not mean "all before
are done".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Tuples grow while loops are unrolled:
# mypy: disable-error-code="assignment, unreachable, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# B tokens (one of each text), R rows of W, K its columns, G groups of columns that one thread adds up


@triton.jit
def _weights(w, row_R, tile: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile of a program's rows that begins at column ``tile * BLOCK_K``; zeros outside."""
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row_R[:, None] < ROWS) & (k[None, :] < K)
    return tl.load(w + row_R[:, None] * K + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _tokens(x, tile: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of a tile: [G, 8]. A group lies in one thread, as W's do."""
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.load(x + k, mask=k < K, other=0.0)


@triton.jit
def _products(w_RK, x_G8, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of the products of 8 neighbouring columns: [R, G]."""
    return tl.sum(tl.reshape(w_RK, (BLOCK_R, BLOCK_K // 8, 8)) * x_G8[None, :, :], 2)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def decode_vector(
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
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_R rows of the output [BATCH, ROWS] of x [BATCH, K].

    NORM: of x / rms(x). PAIR: w is [2 ROWS, K], the output silu(first half) * second half. RESIDUAL: the output is
    added to what ``out`` holds. SCALED: the rows of w are integers with a scale each. AHEAD: tiles of a program's rows
    that are under way before it waits; later ones follow at that distance.
    """
    if PDL:
        gdc_launch_dependents()
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tiles, upper = (), ()
    for i in tl.static_range(AHEAD):
        tiles = tiles + (_weights(w, row_R, i, ROWS, K, BLOCK_K),)  # noqa: RUF005
        if PAIR:
            upper = upper + (_weights(w + ROWS * K, row_R, i, ROWS, K, BLOCK_K),)  # noqa: RUF005
    inside = row_R < ROWS
    if SCALED:
        scale_R = tl.load(scale + row_R, mask=inside, other=0.0)
        if PAIR:
            upper_scale_R = tl.load(scale + ROWS + row_R, mask=inside, other=0.0)
    if PDL:
        gdc_wait()

    # All that is read, first: then its latency counts once.
    xs, residuals = (), ()
    for i in tl.static_range(TILES * BATCH):
        xs = xs + (_tokens(x + i % BATCH * K, i // BATCH, K, BLOCK_K),)  # noqa: RUF005
    if RESIDUAL:
        for b in tl.static_range(BATCH):
            residuals = residuals + (tl.load(out + b * ROWS + row_R, mask=inside, other=0.0),)  # noqa: RUF005
    squares, sums, upper_sums = (), (), ()
    for _ in tl.static_range(BATCH):
        squares = squares + (tl.zeros([BLOCK_K // 8, 8], tl.float32),)  # noqa: RUF005
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_K // 8], tl.float32),)  # noqa: RUF005
        upper_sums = upper_sums + (tl.zeros([BLOCK_R, BLOCK_K // 8], tl.float32),)  # noqa: RUF005
    for i in tl.static_range(TILES):
        if i + AHEAD < TILES:
            tiles = tiles + (_weights(w, row_R, i + AHEAD, ROWS, K, BLOCK_K),)  # noqa: RUF005
            if PAIR:
                upper = upper + (_weights(w + ROWS * K, row_R, i + AHEAD, ROWS, K, BLOCK_K),)  # noqa: RUF005
        added, upper_added, squared = (), (), ()
        tile_RK = tiles[i].to(tl.float32)
        if PAIR:
            upper_RK = upper[i].to(tl.float32)
        for b in tl.static_range(BATCH):
            x_G8 = xs[i * BATCH + b].to(tl.float32)
            added = added + (sums[b] + _products(tile_RK, x_G8, BLOCK_R, BLOCK_K),)  # noqa: RUF005
            if PAIR:
                upper_added = upper_added + (upper_sums[b] + _products(upper_RK, x_G8, BLOCK_R, BLOCK_K),)  # noqa: RUF005
            if NORM:
                squared = squared + (squares[b] + x_G8 * x_G8,)  # noqa: RUF005
        sums, upper_sums, squares = added, upper_added, squared

    for b in tl.static_range(BATCH):
        y_R = tl.sum(sums[b], 1)
        rstd = 1.0
        if NORM:
            rstd = 1 / tl.sqrt_rn(tl.sum(tl.sum(squares[b], 1), 0) / K + eps)
            y_R *= rstd
        if SCALED:
            y_R *= scale_R
        if PAIR:
            upper_R = tl.sum(upper_sums[b], 1) * rstd
            if SCALED:
                upper_R *= upper_scale_R
            y_R = swiglu(y_R, upper_R)
        if RESIDUAL:
            y_R += residuals[b].to(tl.float32)
        tl.store(out + b * ROWS + row_R, y_R.to(out.dtype.element_ty), mask=inside)


@triton.jit
def row_scales(scale, made_M, ROWS: tl.constexpr, PAIR: tl.constexpr, SCALED: tl.constexpr):
    """The scales of the rows of an integer W, and with PAIR of those of its upper half; 1 where there are none."""
    scale_M = tl.full([made_M.shape[0]], 1.0, tl.float32)
    upper_M = scale_M
    if SCALED:
        scale_M = tl.load(scale + made_M, mask=made_M < ROWS, other=0.0)
        if PAIR:
            upper_M = tl.load(scale + ROWS + made_M, mask=made_M < ROWS, other=0.0)
    return scale_M, upper_M


@triton.jit
def read_beside(
    out, squares, made_M, b_B, batch,
    ROWS: tl.constexpr, SQUARES: tl.constexpr, BLOCK_S: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What the end of a product takes beside its sums: the residual [M, B], and the parts [S, B] of x's squares."""
    residual_MB = tl.zeros([made_M.shape[0], b_B.shape[0]], out.dtype.element_ty)
    squares_SB = tl.zeros([BLOCK_S, b_B.shape[0]], tl.float32)
    inside_B = b_B < batch
    if RESIDUAL:
        inside_MB = (made_M < ROWS)[:, None] & inside_B[None, :]
        residual_MB = tl.load(out + b_B[None, :] * ROWS + made_M[:, None], mask=inside_MB, other=0.0)
    if NORM:
        s_S = tl.arange(0, BLOCK_S)
        inside_SB = (s_S[:, None] < SQUARES) & inside_B[None, :]
        squares_SB = tl.load(squares + s_S[:, None] * batch + b_B[None, :], mask=inside_SB, other=0.0)
    return residual_MB, squares_SB


@triton.jit
def reciprocal_rms(squares_SB, eps, K: tl.constexpr, NORM: tl.constexpr):
    """1 / rms of each token of x; 1 without NORM."""
    if NORM:
        return 1 / tl.sqrt_rn(tl.sum(squares_SB, 0) / K + eps)
    else:
        return tl.full([squares_SB.shape[1]], 1.0, tl.float32)


@triton.jit
def write_product(
    acc_RB, residual_MB, rstd_B, scale_M, upper_scale_M, row_R, made_M, b_B, out, squares_out, parts, arrived,
    batch, ROWS: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr, PAIR: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """From the sums [R, B] of a program's columns to its rows of the output, by whoever of its SPLITS is the last.

    row_R: the rows of W; made_M: those of the output, half as many with PAIR, whose gates come first.
    """
    BLOCK_R: tl.constexpr = acc_RB.shape[0]
    BLOCK_B: tl.constexpr = acc_RB.shape[1]
    MADE: tl.constexpr = made_M.shape[0]
    W_ROWS: tl.constexpr = ROWS * 2 if PAIR else ROWS
    inside_B = b_B < batch
    place_MB = b_B[None, :] * ROWS + made_M[:, None]
    inside_MB = (made_M < ROWS)[:, None] & inside_B[None, :]
    last = True
    acc_MB = acc_RB
    upper_MB = acc_RB
    if SPLITS > 1:
        part_RB = b_B[None, :] * W_ROWS + row_R[:, None]
        # Which rows there are is known by those of the output: behind the last gate come the rows of the other half.
        inside_R = (tl.program_id(0) * MADE + tl.arange(0, BLOCK_R) % MADE) < ROWS
        part = parts + tl.program_id(1) * (batch * W_ROWS)
        tl.store(part + part_RB, acc_RB, mask=inside_R[:, None] & inside_B[None, :])
        counter = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        tl.debug_barrier()  # all of a program's stores come before its arrival
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        acc_MB = tl.zeros([MADE, BLOCK_B], tl.float32)
        upper_MB = acc_MB
        if last:
            part_MB = b_B[None, :] * W_ROWS + made_M[:, None]
            # As many loads at once as there are registers for.
            for i in tl.range(SPLITS, loop_unroll_factor=max(1, min(SPLITS, 8192 // (BLOCK_R * BLOCK_B)))):
                here = parts + i * (batch * W_ROWS) + part_MB
                acc_MB += tl.load(here, mask=inside_MB, other=0.0, cache_modifier=".cg")
                if PAIR:
                    upper_MB += tl.load(here + ROWS, mask=inside_MB, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    elif PAIR:
        acc_MB, upper_MB = tl.split(tl.permute(tl.reshape(acc_RB, (2, MADE, BLOCK_B)), (1, 2, 0)))
    if last:
        if NORM:
            acc_MB *= rstd_B[None, :]
            upper_MB *= rstd_B[None, :]
        if SCALED:
            acc_MB *= scale_M[:, None]
            if PAIR:
                upper_MB *= upper_scale_M[:, None]
        if PAIR:
            acc_MB = swiglu(acc_MB, upper_MB)
        if RESIDUAL:
            acc_MB += residual_MB.to(tl.float32)
        made_MB = acc_MB.to(out.dtype.element_ty)
        tl.store(out + place_MB, made_MB, mask=inside_MB)
        if RESIDUAL:
            wide_MB = tl.where(inside_MB, made_MB.to(tl.float32), 0.0)
            tl.store(squares_out + tl.program_id(0) * batch + b_B, tl.sum(wide_MB * wide_MB, 0), mask=inside_B)


@triton.jit(do_not_specialize=["batch"])
def decode_matrix(
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
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """The output [batch, ROWS] of BLOCK_R rows of W and BLOCK_B tokens; as ``decode_vector``.

    With PAIR half of a tile's rows are gates and half are what they let through, so it makes BLOCK_R / 2 rows of the
    output. The grid is (row blocks, SPLITS, token blocks). With SPLITS > 1, ``parts`` is fp32 room for
    [SPLITS, batch, rows of W], and ``arrived`` a count of zero for each row block and token block, which is zero again
    at the end. AHEAD: tiles of W that a program reads before the wait, to registers; all others flow through STAGES of
    shared memory.

    The squares of x that NORM wants are sums [SQUARES, batch] that its maker left, and with RESIDUAL each program
    leaves those of its rows, [row blocks, batch]. They are not added up in the loop here: Triton (3.6) gives what is
    read into registers a buffer less than what the tensor cores read, and x would be both.
    """
    if PDL:
        gdc_launch_dependents()
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SEGMENT: tl.constexpr = (TILES + SPLITS - 1) // SPLITS * BLOCK_K
    MADE: tl.constexpr = BLOCK_R // 2 if PAIR else BLOCK_R
    split = tl.program_id(1)
    made_M = tl.program_id(0) * MADE + tl.arange(0, MADE)
    r_R = tl.arange(0, BLOCK_R)
    row_R = tl.program_id(0) * MADE + r_R % MADE
    inside_R = row_R < ROWS
    if PAIR:
        row_R += r_R // MADE * ROWS
    b_B = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    k_K = tl.arange(0, BLOCK_K)
    first = split * SEGMENT
    w_RK = w + row_R[:, None] * K + k_K[None, :]
    early = ()
    for n in tl.static_range(AHEAD):
        inside_RK = inside_R[:, None] & (first + n * BLOCK_K + k_K[None, :] < K)
        early = early + (tl.load(w_RK + first + n * BLOCK_K, mask=inside_RK, other=0.0),)  # noqa: RUF005
    inside_B = b_B < batch
    scale_M, upper_scale_M = row_scales(scale, made_M, ROWS, PAIR, SCALED)
    if PDL:
        gdc_wait()

    residual_MB, squares_SB = read_beside(
        out, squares, made_M, b_B, batch, ROWS, SQUARES, BLOCK_S, NORM, RESIDUAL
    )  # fmt: skip
    acc_RB = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    x_KB = x + b_B[None, :] * K + k_K[:, None]
    early_x = ()
    for n in tl.static_range(AHEAD):
        inside_KB = inside_B[None, :] & (first + n * BLOCK_K + k_K[:, None] < K)
        early_x = early_x + (tl.load(x_KB + first + n * BLOCK_K, mask=inside_KB, other=0.0),)  # noqa: RUF005
    if AHEAD * BLOCK_K < SEGMENT:
        for start in tl.range(first + AHEAD * BLOCK_K, min(first + SEGMENT, K), BLOCK_K, num_stages=STAGES):
            start = tl.multiple_of(start, BLOCK_K)
            if K % BLOCK_K == 0:
                here_RK, here_KB = inside_R[:, None], inside_B[None, :]
            else:
                here_RK = inside_R[:, None] & (start + k_K[None, :] < K)
                here_KB = inside_B[None, :] & (start + k_K[:, None] < K)
            tokens_KB = tl.load(x_KB + start, mask=here_KB, other=0.0)
            tile_RK = tl.load(w_RK + start, mask=here_RK, other=0.0).to(tokens_KB.dtype)
            acc_RB = tl.dot(tile_RK, tokens_KB, acc_RB, input_precision=PRECISION)
    for n in tl.static_range(AHEAD):
        acc_RB = tl.dot(early[n].to(x.dtype.element_ty), early_x[n], acc_RB, input_precision=PRECISION)

    write_product(
        acc_RB, residual_MB, reciprocal_rms(squares_SB, eps, K, NORM), scale_M, upper_scale_M, row_R, made_M, b_B,
        out, squares_out, parts, arrived, batch, ROWS, SPLITS, NORM, PAIR, RESIDUAL, SCALED,
    )  # fmt: skip


@triton.jit
def decode_enter(
    ids, embedding, fast, z_H, z_L, x, squares, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BOTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The states that a token's forward pass begins with, and what its first stack reads: z_H, or with BOTH z_H + z_L.

    squares [B] are those of x, added up.

    The first kernel of a step is launched as an ordinary one, so that whatever came before it is done when the kernels
    behind it begin, ahead of their own waits.
    """
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    row = tl.load(ids + b).to(tl.int64)
    dtype = x.dtype.element_ty
    slow_D = (tl.load(embedding + row * D + d, mask=inside, other=0.0).to(tl.float32) * scale).to(dtype)
    fast_D = tl.load(fast + d, mask=inside, other=0.0).to(dtype)
    tl.store(z_H + b * D + d, slow_D, mask=inside)
    tl.store(z_L + b * D + d, fast_D, mask=inside)
    if BOTH:
        slow_D = (slow_D.to(tl.float32) + fast_D.to(tl.float32)).to(dtype)
    tl.store(x + b * D + d, slow_D, mask=inside)
    wide_D = slow_D.to(tl.float32)
    tl.store(squares + b, tl.sum(wide_D * wide_D, 0))


@triton.jit
def decode_exit(
    x, state, other, squares, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, BOTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The end of a stack for one token: state = norm(x) or x; and what the next stack reads, x = state (+ other).

    squares [B] are those of the new x, added up.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    dtype = x.dtype.element_ty
    x_D = tl.load(x + b * D + d, mask=inside, other=0.0)
    if NORM:
        wide_D = x_D.to(tl.float32)
        x_D = (wide_D * (1 / tl.sqrt_rn(tl.sum(wide_D * wide_D, 0) / D + eps))).to(dtype)
    tl.store(state + b * D + d, x_D, mask=inside)
    if BOTH:
        other_D = tl.load(other + b * D + d, mask=inside, other=0.0)
        x_D = (x_D.to(tl.float32) + other_D.to(tl.float32)).to(dtype)
    tl.store(x + b * D + d, x_D, mask=inside)
    wide_D = x_D.to(tl.float32)
    tl.store(squares + b, tl.sum(wide_D * wide_D, 0))
