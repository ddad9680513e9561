"""PrefixLM attention over packed samples in Triton: every tile of work lies inside one sample.

FlexAttention cuts the packed axis into blocks of 128 wherever samples begin, so that on short samples most pairs of a
block are masked out. Here a tile starts where its sample starts, the visible keys of a tile of queries are one range
[0, max(prefix, last query + 1)), and only the blocks that the diagonal, the prefix' end or the sample's end cuts are
masked at all. Tiles are sorted by their work, longest first, so that the last ones to run are short.

The softmax is the online one of FlashAttention (arXiv 2205.14135, 2307.08691); the backward pass runs once over tiles
of keys (dk, dv) and once over tiles of queries (dq), which costs seven products in the place of five, but needs no
atomics: the same input gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# T packed tokens, N heads, H head width; M queries and C keys of a tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _own_tile(tiles, NUM_HEADS: tl.constexpr):
    """The head of this program, and of its tile the sample's start, length and prefix and the tile's first row."""
    tile, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    here = tiles + 4 * tile
    return head, tl.load(here), tl.load(here + 1), tl.load(here + 2), tl.load(here + 3)


@triton.jit
def _forward_over(
    accumulated,
    maximum_M,
    total_M,
    q_MH,
    k,
    v,
    low,
    high,
    length,
    prefix,
    row_M,
    token_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax of a tile of queries over the keys [low, high) of their sample."""
    h = tl.arange(0, HEAD_DIM)
    for begin in range(low, high, BLOCK_C):
        key_C = begin + tl.arange(0, BLOCK_C)
        offset_CH = key_C[:, None] * token_stride + h[None, :]
        if MASKED:
            k_CH = tl.load(k + offset_CH, mask=key_C[:, None] < length, other=0.0)
            v_CH = tl.load(v + offset_CH, mask=key_C[:, None] < length, other=0.0)
        else:
            k_CH = tl.load(k + offset_CH)
            v_CH = tl.load(v + offset_CH)
        score_MC = tl.dot(q_MH, tl.trans(k_CH), input_precision=PRECISION) * scale_log2
        if MASKED:
            visible = (key_C[None, :] < length) & ((key_C[None, :] <= row_M[:, None]) | (key_C[None, :] < prefix))
            score_MC = tl.where(visible, score_MC, -1e30)
        higher_M = tl.maximum(maximum_M, tl.max(score_MC, 1))
        p_MC = tl.exp2(score_MC - higher_M[:, None])
        shrink_M = tl.exp2(maximum_M - higher_M)
        total_M = total_M * shrink_M + tl.sum(p_MC, 1)
        accumulated = accumulated * shrink_M[:, None]
        accumulated = tl.dot(p_MC.to(v_CH.dtype), v_CH, accumulated, input_precision=PRECISION)
        maximum_M = higher_M
    return accumulated, maximum_M, total_M


@triton.jit(do_not_specialize=["num_tokens"])
def attention_forward(
    q,
    k,
    v,
    gate,
    out,
    lse,
    tiles,
    num_tokens,
    token_stride,
    head_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head: out [T, N, H] = (sigmoid(gate) *) attention, lse [N, T] in base 2."""
    head, start, length, prefix, first = _own_tile(tiles, NUM_HEADS)
    here = start.to(tl.int64) * token_stride + head * head_stride
    row_M = first + tl.arange(0, BLOCK_M)
    h = tl.arange(0, HEAD_DIM)
    inside = row_M[:, None] < length
    q_MH = tl.load(q + here + row_M[:, None] * token_stride + h[None, :], mask=inside, other=0.0)

    scale_log2 = scale * LOG2E
    end = tl.minimum(length, tl.maximum(prefix, first + BLOCK_M))
    # Every query of the tile sees all keys before `whole`; beyond lie the diagonal, the prefix' end, the sample's end.
    whole = tl.minimum(end, tl.maximum(prefix, first + 1)) // BLOCK_C * BLOCK_C
    accumulated = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    maximum_M = tl.full([BLOCK_M], -1e30, tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    accumulated, maximum_M, total_M = _forward_over(
        accumulated, maximum_M, total_M, q_MH, k + here, v + here, 0, whole, length, prefix, row_M, token_stride,
        scale_log2, HEAD_DIM, BLOCK_C, False, PRECISION,
    )  # fmt: skip
    accumulated, maximum_M, total_M = _forward_over(
        accumulated, maximum_M, total_M, q_MH, k + here, v + here, whole, end, length, prefix, row_M, token_stride,
        scale_log2, HEAD_DIM, BLOCK_C, True, PRECISION,
    )  # fmt: skip
    y_MH = accumulated / total_M[:, None]
    if GATED:
        gate_MH = tl.load(gate + here + row_M[:, None] * token_stride + h[None, :], mask=inside, other=0.0)
        y_MH = y_MH * tl.sigmoid(gate_MH.to(tl.float32))
    token_M = start.to(tl.int64) + row_M
    out_MH = out + token_M[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + h[None, :]
    tl.store(out_MH, y_MH.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * num_tokens + token_M, maximum_M + tl.log2(total_M), mask=row_M < length)


@triton.jit
def _store_rotated_back(
    gradient_BH,
    to,
    offset_B,
    inside_B,
    cos,
    sin,
    token_B,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Store the gradient of rows [B, H]; with ROTARY it is turned back by the angle of its token first."""
    h = tl.arange(0, HEAD_DIM)
    if ROTARY:
        HALF: tl.constexpr = HEAD_DIM // 2
        half = tl.arange(0, HALF)
        halves = tl.permute(tl.reshape(gradient_BH, (ROWS, 2, HALF)), (0, 2, 1))
        first, second = tl.split(halves)
        angle = token_B[:, None] * HALF + half[None, :]
        c = tl.load(cos + angle, mask=inside_B[:, None], other=0.0)
        s = tl.load(sin + angle, mask=inside_B[:, None], other=0.0)
        place = to + offset_B[:, None] + half[None, :]
        tl.store(place, (first * c + second * s).to(to.dtype.element_ty), mask=inside_B[:, None])
        tl.store(place + HALF, (second * c - first * s).to(to.dtype.element_ty), mask=inside_B[:, None])
    else:
        place = to + offset_B[:, None] + h[None, :]
        tl.store(place, gradient_BH.to(to.dtype.element_ty), mask=inside_B[:, None])


@triton.jit
def _backward_keys_over(
    dk_CH,
    dv_CH,
    k_CH,
    v_CH,
    q,
    dy,
    lse,
    delta,
    low,
    high,
    length,
    prefix,
    key_C,
    token_stride,
    dy_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a tile of keys and values from the queries [low, high) of their sample."""
    h = tl.arange(0, HEAD_DIM)
    for begin in range(low, high, BLOCK_M):
        row_M = begin + tl.arange(0, BLOCK_M)
        inside = row_M[:, None] < length
        q_MH = tl.load(q + row_M[:, None] * token_stride + h[None, :], mask=inside, other=0.0)
        dy_MH = tl.load(dy + row_M[:, None] * dy_stride + h[None, :], mask=inside, other=0.0)
        # Rows past the sample's end have zero queries and gradients, and with this lse a finite p: they add nothing.
        lse_M = tl.load(lse + row_M, mask=row_M < length, other=0.0)
        delta_M = tl.load(delta + row_M, mask=row_M < length, other=0.0)
        score_CM = tl.dot(k_CH, tl.trans(q_MH), input_precision=PRECISION) * scale_log2
        p_CM = tl.exp2(score_CM - lse_M[None, :])
        if MASKED:
            p_CM = tl.where((key_C[:, None] <= row_M[None, :]) | (key_C[:, None] < prefix), p_CM, 0.0)
        dv_CH = tl.dot(p_CM.to(dy_MH.dtype), dy_MH, dv_CH, input_precision=PRECISION)
        dp_CM = tl.dot(v_CH, tl.trans(dy_MH), input_precision=PRECISION)
        ds_CM = p_CM * (dp_CM - delta_M[None, :])
        dk_CH = tl.dot(ds_CM.to(q_MH.dtype), q_MH, dk_CH, input_precision=PRECISION)
    return dk_CH, dv_CH


@triton.jit(do_not_specialize=["num_tokens"])
def attention_backward_keys(
    q,
    k,
    v,
    dy,
    dk,
    dv,
    lse,
    delta,
    cos,
    sin,
    tiles,
    num_tokens,
    token_stride,
    head_stride,
    gradient_token_stride,
    gradient_head_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys of one head: dk and dv, dk turned back by its rotary angle."""
    head, start, length, prefix, first = _own_tile(tiles, NUM_HEADS)
    here = start.to(tl.int64) * token_stride + head * head_stride
    key_C = first + tl.arange(0, BLOCK_C)
    h = tl.arange(0, HEAD_DIM)
    inside = key_C[:, None] < length
    offset_CH = here + key_C[:, None] * token_stride + h[None, :]
    k_CH = tl.load(k + offset_CH, mask=inside, other=0.0)
    v_CH = tl.load(v + offset_CH, mask=inside, other=0.0)
    dk_CH = tl.zeros([BLOCK_C, HEAD_DIM], tl.float32)
    dv_CH = tl.zeros([BLOCK_C, HEAD_DIM], tl.float32)

    dy_stride = NUM_HEADS * HEAD_DIM
    dy_here = dy + start.to(tl.int64) * dy_stride + head * HEAD_DIM
    row = head.to(tl.int64) * num_tokens + start
    scale_log2 = scale * LOG2E
    # Queries before `low` see no key of the tile. From `whole` on they see all, as every query does with a tile that
    # lies within the prefix.
    last = tl.minimum(first + BLOCK_C, length)
    low = tl.where(first < prefix, 0, first // BLOCK_M * BLOCK_M)
    whole = tl.where(last <= prefix, low, tl.cdiv(last - 1, BLOCK_M) * BLOCK_M)
    dk_CH, dv_CH = _backward_keys_over(
        dk_CH, dv_CH, k_CH, v_CH, q + here, dy_here, lse + row, delta + row, low, whole, length, prefix, key_C,
        token_stride, dy_stride, scale_log2, HEAD_DIM, BLOCK_M, True, PRECISION,
    )  # fmt: skip
    dk_CH, dv_CH = _backward_keys_over(
        dk_CH, dv_CH, k_CH, v_CH, q + here, dy_here, lse + row, delta + row, whole, length, length, prefix, key_C,
        token_stride, dy_stride, scale_log2, HEAD_DIM, BLOCK_M, False, PRECISION,
    )  # fmt: skip
    token_C = start.to(tl.int64) + key_C
    to_C = token_C * gradient_token_stride + head * gradient_head_stride
    inside_C = key_C < length
    _store_rotated_back(dv_CH, dv, to_C, inside_C, cos, sin, token_C, HEAD_DIM, BLOCK_C, False)
    _store_rotated_back(dk_CH * scale, dk, to_C, inside_C, cos, sin, token_C, HEAD_DIM, BLOCK_C, ROTARY)


@triton.jit
def _backward_queries_over(
    dq_MH,
    q_MH,
    dy_MH,
    lse_M,
    delta_M,
    k,
    v,
    low,
    high,
    length,
    prefix,
    row_M,
    token_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of queries from the keys [low, high) of their sample."""
    h = tl.arange(0, HEAD_DIM)
    for begin in range(low, high, BLOCK_C):
        key_C = begin + tl.arange(0, BLOCK_C)
        offset_CH = key_C[:, None] * token_stride + h[None, :]
        if MASKED:
            k_CH = tl.load(k + offset_CH, mask=key_C[:, None] < length, other=0.0)
            v_CH = tl.load(v + offset_CH, mask=key_C[:, None] < length, other=0.0)
        else:
            k_CH = tl.load(k + offset_CH)
            v_CH = tl.load(v + offset_CH)
        score_MC = tl.dot(q_MH, tl.trans(k_CH), input_precision=PRECISION) * scale_log2
        p_MC = tl.exp2(score_MC - lse_M[:, None])
        if MASKED:
            visible = (key_C[None, :] < length) & ((key_C[None, :] <= row_M[:, None]) | (key_C[None, :] < prefix))
            p_MC = tl.where(visible, p_MC, 0.0)
        dp_MC = tl.dot(dy_MH, tl.trans(v_CH), input_precision=PRECISION)
        ds_MC = p_MC * (dp_MC - delta_M[:, None])
        dq_MH = tl.dot(ds_MC.to(k_CH.dtype), k_CH, dq_MH, input_precision=PRECISION)
    return dq_MH


@triton.jit(do_not_specialize=["num_tokens"])
def attention_backward_queries(
    q,
    k,
    v,
    dy,
    dq,
    lse,
    delta,
    cos,
    sin,
    tiles,
    num_tokens,
    token_stride,
    head_stride,
    gradient_token_stride,
    gradient_head_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROTARY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head: dq, turned back by its rotary angle."""
    head, start, length, prefix, first = _own_tile(tiles, NUM_HEADS)
    here = start.to(tl.int64) * token_stride + head * head_stride
    row_M = first + tl.arange(0, BLOCK_M)
    token_M = start.to(tl.int64) + row_M
    inside_M = row_M < length
    h = tl.arange(0, HEAD_DIM)
    q_MH = tl.load(q + here + row_M[:, None] * token_stride + h[None, :], mask=inside_M[:, None], other=0.0)
    dy_offset = token_M[:, None] * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + h[None, :]
    dy_MH = tl.load(dy + dy_offset, mask=inside_M[:, None], other=0.0)
    statistic_M = head.to(tl.int64) * num_tokens + token_M
    lse_M = tl.load(lse + statistic_M, mask=inside_M, other=0.0)
    delta_M = tl.load(delta + statistic_M, mask=inside_M, other=0.0)

    end = tl.minimum(length, tl.maximum(prefix, first + BLOCK_M))
    whole = tl.minimum(end, tl.maximum(prefix, first + 1)) // BLOCK_C * BLOCK_C
    scale_log2 = scale * LOG2E
    dq_MH = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    dq_MH = _backward_queries_over(
        dq_MH, q_MH, dy_MH, lse_M, delta_M, k + here, v + here, 0, whole, length, prefix, row_M, token_stride,
        scale_log2, HEAD_DIM, BLOCK_C, False, PRECISION,
    )  # fmt: skip
    dq_MH = _backward_queries_over(
        dq_MH, q_MH, dy_MH, lse_M, delta_M, k + here, v + here, whole, end, length, prefix, row_M, token_stride,
        scale_log2, HEAD_DIM, BLOCK_C, True, PRECISION,
    )  # fmt: skip
    to_M = token_M * gradient_token_stride + head * gradient_head_stride
    _store_rotated_back(dq_MH * scale, dq, to_M, inside_M, cos, sin, token_M, HEAD_DIM, BLOCK_M, ROTARY)
