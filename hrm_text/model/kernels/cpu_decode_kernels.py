"""The compiled loops of decoding on a CPU. Importing this imports numba, which takes 0.6 s: only where it decodes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import overload

from hrm_text.model.kernels.cpu_decode_vectors import arranged, as_float, compiled, dots, exponential

# B texts, D width, N heads, H head width, I inner width of the SwiGLU, P tokens a page, K and O inputs and outputs of a
# product. bf16 comes as uint16: numba knows no bf16, and its bits are the upper half of an fp32's.


@compiled()
def products(w: Any, scales: Any, x: Any, y: Any, first: int, last: int) -> None:
    """y[:, first:last] = x w[first:last]^T, times the scale of each row of w where there are scales."""
    texts, rows = len(x), last - first
    x = arranged(w, x)
    # Rows far apart are read at the same time, each run of them from its begin to its end: few long streams.
    at_once = 3 if texts >= 4 else 4
    apart = rows // at_once
    for o in range(first, first + apart):
        b = 0
        while b + 4 <= texts:
            dots(w, o, apart, x, b, y, 3, 4)
            b += 4
        while b < texts:
            if at_once == 3:
                dots(w, o, apart, x, b, y, 3, 1)
            else:
                dots(w, o, apart, x, b, y, 4, 1)
            b += 1
    for o in range(first + at_once * apart, last):
        for b in range(texts):
            dots(w, o, 1, x, b, y, 1, 1)
    if len(scales):
        for b in range(texts):
            for o in range(first, last):
                y[b, o] *= scales[o]


@compiled()
def normalise(x: Any, eps: float, y: Any) -> None:
    """y = x / sqrt(mean(x^2) + eps), row by row."""
    for b in range(len(x)):
        total = np.float32(0)
        for d in range(x.shape[1]):
            total += x[b, d] * x[b, d]
        factor = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + np.float32(eps))
        for d in range(x.shape[1]):
            y[b, d] = x[b, d] * factor


@compiled()
def rotate(x: Any, cos: Any, sin: Any) -> None:
    """The rotary embedding of one vector [H], in place: pairs of its first and its second half."""
    half = len(x) // 2
    for i in range(half):
        first, second = x[i], x[half + i]
        x[i] = first * cos[i] - second * sin[i]
        x[half + i] = second * cos[i] + first * sin[i]


@compiled(fastmath=False)
def store(x: Any, places: Any, scales: Any, page: int, head: int, place: int) -> None:
    """Write one vector [H] into the cache [pages, N, P, H], rounded as ``PagedKeyValues.write`` rounds."""
    store_as(x, places[page, head, place], scales, page, head, place)


def store_as(x: Any, found: Any, scales: Any, page: int, head: int, place: int) -> None:
    """Write one vector into its place, for each kind of cache; in compiled code alone."""
    raise NotImplementedError


@overload(store_as)
def _store_as(x: Any, found: Any, scales: Any, page: int, head: int, place: int) -> Any:
    def store_fp32(x: Any, found: Any, scales: Any, page: int, head: int, place: int) -> None:
        found[:] = x

    def store_bf16(x: Any, found: Any, scales: Any, page: int, head: int, place: int) -> None:
        for i in range(len(x)):
            bits = np.float32(x[i]).view(np.uint32)
            found[i] = np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

    def store_int8(x: Any, found: Any, scales: Any, page: int, head: int, place: int) -> None:
        largest = np.float32(1e-12)
        for i in range(len(x)):
            largest = max(largest, abs(x[i]))
        scale = largest / np.float32(127)
        scales[page, head, place] = scale
        for i in range(len(x)):
            found[i] = np.int8(np.rint(x[i] / scale))

    return {types.float32: store_fp32, types.uint16: store_bf16, types.int8: store_int8}[found.dtype]


@compiled()
def attend_one(
    q: Any, keys: Any, values: Any, key_scales: Any, value_scales: Any, head: int, pages: Any, length: int, out: Any
) -> None:
    """softmax(q k^T / sqrt(H)) v of one text and head: q [1, H], keys and values [pages, N, P, H], out [H]."""
    size, width = keys.shape[2], keys.shape[3]
    used = (length + size - 1) // size
    scores = np.empty((1, used * size), np.float32)
    q = arranged(keys[0, 0], q)
    for m in range(used):
        page = pages[m]
        block, found = keys[page, head], scores[:, m * size : (m + 1) * size]
        p = 0
        while p + 4 <= size:
            dots(block, p, 1, q, 0, found, 4, 1)
            p += 4
        while p < size:
            dots(block, p, 1, q, 0, found, 1, 1)
            p += 1
        if len(key_scales):
            for p in range(size):
                found[0, p] *= key_scales[page, head, p]
    row = scores[0]
    largest = row[0]
    for t in range(1, length):
        largest = max(largest, row[t])
    factor = np.float32(1 / math.sqrt(width))
    total = np.float32(0)
    for t in range(length):
        row[t] = exponential((row[t] - largest) * factor)
        total += row[t]
    for i in range(width):
        out[i] = 0
    for m in range(used):
        page = pages[m]
        block = values[page, head]
        for p in range(min(size, length - m * size)):
            weight = row[m * size + p] / total
            if len(value_scales):
                weight *= value_scales[page, head, p]
            for i in range(width):
                out[i] += weight * as_float(block[p, i])


@compiled()
def mix(
    gqkv: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    key_scales: Any,
    value_scales: Any,
    head: int,
    pages: Any,
    length: int,
    out: Any,
) -> None:
    """Gated attention of one text and head, before its output projection: gate, query, key and value are [4, H]."""
    gate, q, k, v = gqkv[0], gqkv[1], gqkv[2], gqkv[3]
    rotate(q, cos, sin)
    rotate(k, cos, sin)
    size = keys.shape[2]
    page, place = pages[(length - 1) // size], (length - 1) % size
    store(k, keys, key_scales, page, head, place)
    store(v, values, value_scales, page, head, place)
    attend_one(gqkv[1:2], keys, values, key_scales, value_scales, head, pages, length, out)
    for i in range(len(out)):
        out[i] /= np.float32(1) + exponential(-gate[i])


@compiled()
def swiglu(gate_up: Any, out: Any, first: int, last: int) -> None:
    """out[:, first:last] = silu(gate) * up, of gate and up side by side."""
    inner = out.shape[1]
    for b in range(len(out)):
        for i in range(first, last):
            gate = gate_up[b, i]
            out[b, i] = gate / (np.float32(1) + exponential(-gate)) * gate_up[b, inner + i]


@compiled()
def share(w: Any, scales: Any, x: Any, y: Any, start: int, outputs: int, thread: int, threads: int) -> None:
    """One thread's part of ``products`` for some outputs from ``start``."""
    products(w, scales, x, y, start + thread * outputs // threads, start + (thread + 1) * outputs // threads)


# ----------------------------------------------------------------------------------------------------- whole steps ---


@compiled(parallel=True)
def linear(w: Any, scales: Any, x: Any, y: Any, threads: int) -> None:
    """y [B, O] = x w^T of x [B, K] and w [O, K], times the scale [O] of each output where there are scales."""
    for thread in prange(threads):
        share(w, scales, x, y, 0, len(w), thread, threads)


@compiled(parallel=True)
def attend(
    q: Any, keys: Any, values: Any, key_scales: Any, value_scales: Any, table: Any, lengths: Any, out: Any
) -> None:
    """``PagedKeyValues.attend`` in one slot: q and out [B, N, H], keys and values [pages, N, P, H]."""
    texts, heads = q.shape[:2]
    for unit in prange(texts * heads):
        b, n = unit % texts, unit // texts
        attend_one(q[b, n : n + 1], keys, values, key_scales, value_scales, n, table[b], lengths[b], out[b, n])


@compiled(parallel=True)
def block(
    x: Any,
    gqkv: Any,
    gqkv_scales: Any,
    out: Any,
    out_scales: Any,
    gate_up: Any,
    gate_up_scales: Any,
    down: Any,
    down_scales: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    key_scales: Any,
    value_scales: Any,
    table: Any,
    lengths: Any,
    eps: float,
    post: bool,
    threads: int,
) -> None:
    """``block.Block`` for the newest token of each of B texts, in place: x [B, D] fp32.

    cos and sin are [B, H / 2], keys and values those of the slot [pages, N, P, H], table [B, M], lengths [B] (with the
    newest token, whose keys and values are written), ``*_scales`` empty where a matrix or the cache has none.
    """
    texts, width = x.shape
    heads, head_dim, inner = keys.shape[1], keys.shape[3], down.shape[1]
    normed, added = np.empty_like(x), np.empty_like(x)
    read = x if post else normed
    gqkv_x = np.empty((texts, 4 * heads * head_dim), np.float32)
    seen = np.empty((texts, heads * head_dim), np.float32)
    gate_up_x = np.empty((texts, 2 * inner), np.float32)
    active = np.empty((texts, inner), np.float32)
    for stage in range(5):
        if not post and (stage == 0 or stage == 3):
            normalise(x, eps, normed)
        # One loop in threads for all stages: each is compiled by itself, with all that it calls.
        for thread in prange(threads):
            if stage == 0:
                share(gqkv, gqkv_scales, read, gqkv_x, 0, len(gqkv), thread, threads)
            elif stage == 1:
                for unit in range(thread, texts * heads, threads):
                    b, n = unit % texts, unit // texts
                    heads_x = gqkv_x[b].reshape(4, heads, head_dim)
                    y = seen[b, n * head_dim : (n + 1) * head_dim]
                    mix(
                        heads_x[:, n],
                        cos[b],
                        sin[b],
                        keys,
                        values,
                        key_scales,
                        value_scales,
                        n,
                        table[b],
                        lengths[b],
                        y,
                    )
            elif stage == 2:
                share(out, out_scales, seen, added, 0, width, thread, threads)
            elif stage == 3:
                share(gate_up, gate_up_scales, read, gate_up_x, 0, inner, thread, threads)
                share(gate_up, gate_up_scales, read, gate_up_x, inner, inner, thread, threads)
                swiglu(gate_up_x, active, thread * inner // threads, (thread + 1) * inner // threads)
            else:
                share(down, down_scales, active, added, 0, width, thread, threads)
        if stage == 2 or stage == 4:
            for b in range(texts):
                for d in range(width):
                    x[b, d] += added[b, d]
            if post:
                normalise(x, eps, x)
