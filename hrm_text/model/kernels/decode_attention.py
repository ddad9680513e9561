"""Attention of one new token of each text over its pages, in Triton: rotation, cache write and gate included.

A program owns one head of one text and its share of the tiles: the longer a text, the more programs. The tokens are
read on the CUDA cores: with one query for each head there is nothing to share. Each row of a tile keeps an online
softmax of its own, so that the loop needs no exchange between threads but for the products themselves; rows, and then
splits, are brought together at the end, in a fixed order. The newest token never passes through memory: the program
that writes it to the cache begins its first row with it.

What lies in the cache depends on no kernel of the same step, so its first tiles are read before the wait for the kernel
that makes the query: the wait is in the first turn of the loop, behind the loads that the pipeline sends ahead.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# B texts, N heads, H head width, M pages a text at most, P tokens a page, C tokens of a tile, S splits

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away rounds an fp32 number below 2^22 to the nearest integer, halves to the even."""


@triton.jit
def _read_tile(
    keys, values, key_scales, value_scales, table, head, tile, position,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile of tokens as they lie, and their scales (of numbers that have none: 1)."""
    token_C = tile * TILE + tl.arange(0, TILE)
    inside_C = token_C < position
    page_C = tl.load(table + token_C // PAGE, mask=inside_C, other=0).to(tl.int64)
    place_C = (page_C * NUM_HEADS + head) * PAGE + token_C % PAGE
    here_CH = place_C[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    k_CH = tl.load(keys + here_CH, mask=inside_C[:, None], other=0.0)
    v_CH = tl.load(values + here_CH, mask=inside_C[:, None], other=0.0)
    key_scale_C = tl.full([TILE], 1.0, tl.float32)
    value_scale_C = tl.full([TILE], 1.0, tl.float32)
    if QUANTIZED:
        key_scale_C = tl.load(key_scales + place_C, mask=inside_C, other=0.0)
        value_scale_C = tl.load(value_scales + place_C, mask=inside_C, other=0.0)
    return k_CH, v_CH, key_scale_C, value_scale_C


@triton.jit
def _attended(
    q_H, k_CH, v_CH, key_scale_C, value_scale_C, tile, past, maximum_C, total_C, acc_CH, TILE: tl.constexpr
):  # fmt: skip
    """The online softmax of each row of a tile, one token further."""
    inside_C = tile * TILE + tl.arange(0, TILE) < past
    score_C = tl.sum(k_CH.to(tl.float32) * q_H[None, :], 1) * key_scale_C
    score_C = tl.where(inside_C, score_C, -1e30)
    higher_C = tl.maximum(maximum_C, score_C)
    shrink_C = tl.exp2(maximum_C - higher_C)
    p_C = tl.where(inside_C, tl.exp2(score_C - higher_C), 0.0)
    total_C = total_C * shrink_C + p_C
    p_C *= value_scale_C
    acc_CH = acc_CH * shrink_C[:, None] + p_C[:, None] * v_CH.to(tl.float32)
    return higher_C, total_C, acc_CH


@triton.jit
def _rotated(own_H, partner_H, cos_H, sin_H):
    """A head turned by its token's angles, rounded to the dtype it came in.

    partner_H: the other number of each pair. sin_H has the sign of its half.
    """
    turned_H = own_H.to(tl.float32) * cos_H + partner_H.to(tl.float32) * sin_H
    return turned_H.to(own_H.dtype).to(tl.float32)


@triton.jit
def _stored(store, scales, place, h_H, x_H, HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr):
    """Write a vector to the cache; returns it as it will be read from there."""
    here = store + place * HEAD_DIM + h_H
    if QUANTIZED:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x_H), 0), 1e-12), 127.0)
        whole_H = (tl.div_rn(x_H, tl.zeros_like(x_H) + scale) + ROUND) - ROUND
        tl.store(here, whole_H.to(tl.int8))
        tl.store(scales + place, scale)
        return whole_H * scale
    kept_H = x_H.to(store.dtype.element_ty)
    tl.store(here, kept_H)
    return kept_H.to(tl.float32)


@triton.jit(do_not_specialize=["pages_each"])
def decode_attention(
    gqkv,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    positions,
    cos,
    sin,
    z,
    parts,
    summaries,
    arrived,
    scale_log2,
    pages_each,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    STAGES: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    """z [B, N H] = sigmoid(gate) * attention of gqkv [B, 4 N H]; the grid is (N, B, SPLITS).

    keys, values and their scales are those of one slot; cos and sin are tables of all positions. ``parts`` is fp32
    room for [B, N, SPLITS, H], ``summaries`` for [B, N, SPLITS, 2], and ``arrived`` a count of zero for each text and
    head, which is zero again at the end.

    LEAST: cached tokens for each program that shares a text; the others have nothing to do. STAGES: tiles in flight
    and one more.

    Positions, tables and the tokens before the newest were written before the step began, so they are read ahead of
    the wait.
    """
    if PDL:
        gdc_launch_dependents()
    head, b, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + b).to(tl.int32)  # and as many tokens are in the cache
    table += b * pages_each
    tiles = (position + TILE - 1) // TILE
    # Texts of a batch differ in length: one program for a long one would be what all others wait for. So would be one
    # with a tile more than the rest: where a program is worth a tile, a tile that is not full has one as well.
    active = tl.minimum(tl.maximum((position + TILE - 1) // LEAST, 1), SPLITS)
    if split >= active:
        return
    h_H = tl.arange(0, HEAD_DIM)
    HALF: tl.constexpr = HEAD_DIM // 2
    angle_H = position * HALF + h_H % HALF
    cos_H = tl.load(cos + angle_H)
    sin_H = tl.where(h_H < HALF, -1.0, 1.0) * tl.load(sin + angle_H)
    page = tl.load(table + position // PAGE).to(tl.int64)
    gate = gqkv + b * (4 * NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
    partner_H = (h_H + HALF) % HEAD_DIM
    q_H = tl.zeros([HEAD_DIM], tl.float32)
    gate_H = tl.zeros([HEAD_DIM], gqkv.dtype.element_ty)
    maximum_C = tl.full([TILE], -1e30, tl.float32)
    total_C = tl.zeros([TILE], tl.float32)
    acc_CH = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for tile in tl.range(split, tl.maximum(tiles, split + 1), active, num_stages=STAGES):
        k_CH, v_CH, key_scale_C, value_scale_C = _read_tile(
            keys, values, key_scales, value_scales, table, head, tile, position,
            NUM_HEADS, HEAD_DIM, PAGE, TILE, QUANTIZED,
        )  # fmt: skip
        if tile == split:
            if PDL:
                gdc_wait()
            q, k = gate + NUM_HEADS * HEAD_DIM, gate + 2 * NUM_HEADS * HEAD_DIM
            # All that is read, first: then its latency counts once.
            own_H, partner_q_H = tl.load(q + h_H), tl.load(q + partner_H)
            k_H, partner_k_H = tl.load(k + h_H), tl.load(k + partner_H)
            v_H, gate_H = tl.load(k + NUM_HEADS * HEAD_DIM + h_H), tl.load(gate + h_H)
            q_H = _rotated(own_H, partner_q_H, cos_H, sin_H) * scale_log2
            newest_k_H = _rotated(k_H, partner_k_H, cos_H, sin_H)
            newest_v_H = v_H.to(tl.float32)
            if split == 0:
                place = (page * NUM_HEADS + head) * PAGE + position % PAGE
                newest_k_H = _stored(keys, key_scales, place, h_H, newest_k_H, HEAD_DIM, QUANTIZED)
                newest_v_H = _stored(values, value_scales, place, h_H, newest_v_H, HEAD_DIM, QUANTIZED)
            # The newest token begins the first row of the first split.
            begins_C = (tl.arange(0, TILE) == 0) & (split == 0)
            maximum_C = tl.where(begins_C, tl.sum(newest_k_H * q_H, 0), -1e30)
            total_C = tl.where(begins_C, 1.0, 0.0)
            acc_CH = tl.where(begins_C[:, None], newest_v_H[None, :], 0.0)
        maximum_C, total_C, acc_CH = _attended(
            q_H, k_CH, v_CH, key_scale_C, value_scale_C, tile, position, maximum_C, total_C, acc_CH, TILE
        )
    maximum = tl.max(maximum_C, 0)
    p_C = tl.exp2(maximum_C - maximum)
    total = tl.sum(total_C * p_C, 0)
    y_H = tl.sum(acc_CH * p_C[:, None], 0)

    sigmoid_H = tl.sigmoid(gate_H.to(tl.float32))
    text_head = b * NUM_HEADS + head
    out = z + text_head * HEAD_DIM + h_H
    if active == 1:
        tl.store(out, (y_H / total * sigmoid_H).to(z.dtype.element_ty))
    elif SPLITS > 1:
        here = text_head * SPLITS + split
        tl.store(parts + here * HEAD_DIM + h_H, y_H)
        tl.store(summaries + here * 2, maximum)
        tl.store(summaries + here * 2 + 1, total)
        tl.debug_barrier()  # all of a program's stores come before its arrival
        if tl.atomic_add(arrived + text_head, 1, sem="acq_rel") == active - 1:
            s_S = tl.arange(0, SPLITS)
            one = text_head * SPLITS + s_S
            maximum_S = tl.load(summaries + one * 2, mask=s_S < active, other=-1e30, cache_modifier=".cg")
            total_S = tl.load(summaries + one * 2 + 1, mask=s_S < active, other=0.0, cache_modifier=".cg")
            part_SH = tl.load(
                parts + one[:, None] * HEAD_DIM + h_H[None, :], mask=s_S[:, None] < active, other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            p_S = tl.exp2(maximum_S - tl.max(maximum_S, 0))
            y_H = tl.sum(part_SH * p_S[:, None], 0) / tl.sum(total_S * p_S, 0)
            tl.store(out, (y_H * sigmoid_H).to(z.dtype.element_ty))
            tl.store(arrived + text_head, 0)
