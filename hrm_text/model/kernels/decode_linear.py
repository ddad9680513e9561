"""The matrix products of one decoding step in Triton: few tokens, so a product is the reading of its weights.

Two forms compute the same four products of a block (``norm(x) W^T``, ``silu(g) * u`` of two halves of rows, and a
product that is added to the residual stream), each rounding once, at its end:

* ``decode_vector``: a program keeps its rows of W in registers and multiplies on the CUDA cores. Many small programs
  have all of a matrix in flight at once; made for one or two tokens.
* ``decode_matrix``: tiles of W flow through shared memory to the tensor cores; K may be split over programs, whose
  last to arrive adds the parts in a fixed order.

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
def _wide(w_RK, PERMUTE: tl.constexpr):
    """Weights in fp32. PERMUTE: four int8 at once, by the byte permutation of NVIDIA's GPUs.

    An integer's conversion has a quarter of a permutation's throughput. A byte b in the low bits of the number 2^23
    makes 2^23 + b, exactly; b is the integer plus 128.
    """
    if PERMUTE:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 bytes;
                xor.b32 bytes, $4, 0x80808080;
                prmt.b32 $0, bytes, 0x4B000000, 0x7440;
                prmt.b32 $1, bytes, 0x4B000000, 0x7441;
                prmt.b32 $2, bytes, 0x4B000000, 0x7442;
                prmt.b32 $3, bytes, 0x4B000000, 0x7443;
                sub.f32 $0, $0, 0f4B000080;
                sub.f32 $1, $1, 0f4B000080;
                sub.f32 $2, $2, 0f4B000080;
                sub.f32 $3, $3, 0f4B000080;
            }
            """,
            "=r,=r,=r,=r,r",
            [w_RK],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        return w_RK.to(tl.float32)


@triton.jit
def _grouped_sum(product_RK, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of 8 neighbouring columns, which lie in one thread: [R, G]."""
    return tl.sum(tl.reshape(product_RK, (BLOCK_R, BLOCK_K // 8, 8)), 2)


@triton.jit
def _swiglu(gate, up):
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
    PERMUTE: tl.constexpr,
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
        k = i // BATCH * BLOCK_K + tl.arange(0, BLOCK_K)
        xs = xs + (tl.load(x + i % BATCH * K + k, mask=k < K, other=0.0),)  # noqa: RUF005
    if RESIDUAL:
        for b in tl.static_range(BATCH):
            residuals = residuals + (tl.load(out + b * ROWS + row_R, mask=inside, other=0.0),)  # noqa: RUF005
    squares, sums, upper_sums = (), (), ()
    for _ in tl.static_range(BATCH):
        squares = squares + (tl.zeros([BLOCK_K], tl.float32),)  # noqa: RUF005
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_K // 8], tl.float32),)  # noqa: RUF005
        upper_sums = upper_sums + (tl.zeros([BLOCK_R, BLOCK_K // 8], tl.float32),)  # noqa: RUF005
    for i in tl.static_range(TILES):
        if i + AHEAD < TILES:
            tiles = tiles + (_weights(w, row_R, i + AHEAD, ROWS, K, BLOCK_K),)  # noqa: RUF005
            if PAIR:
                upper = upper + (_weights(w + ROWS * K, row_R, i + AHEAD, ROWS, K, BLOCK_K),)  # noqa: RUF005
        added, upper_added, squared = (), (), ()
        for b in tl.static_range(BATCH):
            x_K = xs[i * BATCH + b].to(tl.float32)
            product_RK = _wide(tiles[i], PERMUTE) * x_K[None, :]
            added = added + (sums[b] + _grouped_sum(product_RK, BLOCK_R, BLOCK_K),)  # noqa: RUF005
            if PAIR:
                product_RK = _wide(upper[i], PERMUTE) * x_K[None, :]
                upper_added = upper_added + (upper_sums[b] + _grouped_sum(product_RK, BLOCK_R, BLOCK_K),)  # noqa: RUF005
            if NORM:
                squared = squared + (squares[b] + x_K * x_K,)  # noqa: RUF005
        sums, upper_sums, squares = added, upper_added, squared

    for b in tl.static_range(BATCH):
        y_R = tl.sum(sums[b], 1)
        rstd = 1.0
        if NORM:
            rstd = 1 / tl.sqrt_rn(tl.sum(squares[b], 0) / K + eps)
            y_R *= rstd
        if SCALED:
            y_R *= scale_R
        if PAIR:
            upper_R = tl.sum(upper_sums[b], 1) * rstd
            if SCALED:
                upper_R *= upper_scale_R
            y_R = _swiglu(y_R, upper_R)
        if RESIDUAL:
            y_R += residuals[b].to(tl.float32)
        tl.store(out + b * ROWS + row_R, y_R.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _to_cache(w, row_R, first, SEGMENT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr):
    """Ask for the columns [first, first + SEGMENT) of a program's rows to be brought to the L2 cache."""
    PIECE: tl.constexpr = SEGMENT // PIECES
    piece = tl.arange(0, PIECES)
    address = (w + row_R[:, None] * K + first + piece[None, :] * PIECE).to(tl.int64)
    bytes_each: tl.constexpr = PIECE * (w.dtype.element_ty.primitive_bitwidth // 8)
    wanted = tl.broadcast_to((row_R[:, None] < ROWS) & (piece[None, :] >= 0), address.shape).to(tl.int32)
    size = tl.full(address.shape, bytes_each, tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [address, size, wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["batch"])
def decode_matrix(
    x,
    w,
    scale,
    out,
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
    PIECES: tl.constexpr,
    NORM: tl.constexpr,
    PAIR: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_R rows of the output [batch, ROWS] of BLOCK_B tokens; as ``decode_vector``.

    The grid is (row blocks, SPLITS, token blocks). With SPLITS > 1, ``parts`` is fp32 room for [SPLITS, batch, ROWS]
    and ``arrived`` a count of zero for each row block and token block, which is zero again at the end. PIECES: into
    how many requests a row is cut that asks for it before the wait; 0: no such requests.
    """
    if PDL:
        gdc_launch_dependents()
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SEGMENT: tl.constexpr = (TILES + SPLITS - 1) // SPLITS * BLOCK_K
    split = tl.program_id(1)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_B = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    k_K = tl.arange(0, BLOCK_K)
    first = split * SEGMENT
    if PDL and PIECES > 0:
        _to_cache(w, row_R, first, SEGMENT, ROWS, K, PIECES)
        if PAIR:
            _to_cache(w + ROWS * K, row_R, first, SEGMENT, ROWS, K, PIECES)
    inside_R = row_R < ROWS
    inside_B = b_B < batch
    if SCALED:
        scale_R = tl.load(scale + row_R, mask=inside_R, other=0.0)
        if PAIR:
            upper_scale_R = tl.load(scale + ROWS + row_R, mask=inside_R, other=0.0)
    if PDL:
        gdc_wait()

    place_RB = b_B[None, :] * ROWS + row_R[:, None]
    inside_RB = inside_R[:, None] & inside_B[None, :]
    if RESIDUAL:
        residual_RB = tl.load(out + place_RB, mask=inside_RB, other=0.0)
    acc_RB = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    upper_RB = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    squares_KB = tl.zeros([BLOCK_K, BLOCK_B], tl.float32)
    w_RK = w + row_R[:, None] * K + k_K[None, :]
    x_KB = x + b_B[None, :] * K + k_K[:, None]
    for start in tl.range(first, min(first + SEGMENT, K), BLOCK_K, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_K)
        if K % BLOCK_K == 0:
            here_RK, here_KB = inside_R[:, None], inside_B[None, :]
        else:
            here_RK = inside_R[:, None] & (start + k_K[None, :] < K)
            here_KB = inside_B[None, :] & (start + k_K[:, None] < K)
        tokens_KB = tl.load(x_KB + start, mask=here_KB, other=0.0)
        tile_RK = tl.load(w_RK + start, mask=here_RK, other=0.0).to(tokens_KB.dtype)
        acc_RB = tl.dot(tile_RK, tokens_KB, acc_RB, input_precision=PRECISION)
        if PAIR:
            tile_RK = tl.load(w_RK + ROWS * K + start, mask=here_RK, other=0.0).to(tokens_KB.dtype)
            upper_RB = tl.dot(tile_RK, tokens_KB, upper_RB, input_precision=PRECISION)
        if NORM:
            wide_KB = tokens_KB.to(tl.float32)
            squares_KB += wide_KB * wide_KB

    last = True
    if SPLITS > 1:
        tl.static_assert(not (NORM or PAIR), "a split product is neither normed nor paired")
        tl.store(parts + split * (batch * ROWS) + place_RB, acc_RB, mask=inside_RB)
        counter = arrived + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        tl.debug_barrier()  # all of a program's stores come before its arrival
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc_RB = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
            # As many loads at once as there are registers for.
            for i in tl.range(SPLITS, loop_unroll_factor=max(1, min(SPLITS, 8192 // (BLOCK_R * BLOCK_B)))):
                acc_RB += tl.load(
                    parts + i * (batch * ROWS) + place_RB, mask=inside_RB, other=0.0, cache_modifier=".cg"
                )
            tl.store(counter, 0)
    if last:
        if NORM:
            rstd_B = 1 / tl.sqrt_rn(tl.sum(squares_KB, 0) / K + eps)
            acc_RB *= rstd_B[None, :]
            upper_RB *= rstd_B[None, :]
        if SCALED:
            acc_RB *= scale_R[:, None]
            if PAIR:
                upper_RB *= upper_scale_R[:, None]
        if PAIR:
            acc_RB = _swiglu(acc_RB, upper_RB)
        if RESIDUAL:
            acc_RB += residual_RB.to(tl.float32)
        tl.store(out + place_RB, acc_RB.to(out.dtype.element_ty), mask=inside_RB)


@triton.jit
def decode_enter(
    ids, embedding, fast, z_H, z_L, x, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BOTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The states that a token's forward pass begins with, and what its first stack reads: z_H, or with BOTH z_H + z_L.

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


@triton.jit
def decode_exit(
    x, state, other, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr, BOTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The end of a stack for one token: state = norm(x) or x; and what the next stack reads, x = state (+ other)."""
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
