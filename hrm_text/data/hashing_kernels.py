"""The compiled loops that hash records and look for runs of tokens in them.

In one file, because numba keeps what it compiled for as long as the file of the function that was called is unchanged:
a change to what it calls elsewhere would go unnoticed. Compiled on first use (a few seconds in all); importing this
imports numba, which takes 0.4 s: only where something is hashed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64

from hrm_text.data.packing_kernels import compiled

SHINGLE = 5
"""Tokens."""


@njit(inline="always")
def mix(value: Any) -> Any:
    """A bijection of 64 bits in which every bit reaches every other: the finaliser of MurmurHash3."""
    value = uint64(value)
    value = (value ^ (value >> uint64(33))) * uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> uint64(33))) * uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> uint64(33))


@compiled
def hash_rows(
    tokens: npt.NDArray[np.integer],
    inst_start: npt.NDArray[np.int64],
    inst_len: npt.NDArray[np.int64],
    resp_start: npt.NDArray[np.int64],
    resp_len: npt.NDArray[np.int64],
    constants: npt.NDArray[np.uint32],
    rows: int,
    record: npt.NDArray[np.uint32],
    whole: npt.NDArray[np.uint64],
    keys: npt.NDArray[np.uint64],
) -> None:
    functions = constants.shape[1]
    added, factors, second_factors = constants[0], constants[1], constants[2]
    smallest = np.empty(functions, np.uint32)
    for row in range(len(inst_len)):
        prefix = inst_len[row]
        length = prefix + resp_len[row]
        for i in range(prefix):
            record[i] = tokens[inst_start[row] + i]
        for i in range(resp_len[row]):
            record[prefix + i] = tokens[resp_start[row] + i]

        # Two hashes of different build: 128 bits, of which two of 600 million records agree with a chance of 5e-22.
        one: Any
        two: Any
        one, two = mix(prefix), mix(prefix + 0x9E3779B9)
        for i in range(length):
            one = (one ^ uint64(record[i])) * uint64(0x9E3779B97F4A7C15)
            one = one ^ (one >> uint64(32))
            two = ((two << uint64(5)) | (two >> uint64(59))) + uint64(record[i]) + uint64(1)
            two = two * uint64(0xD6E8FEB86659FD93)
        whole[row, 0], whole[row, 1] = mix(one ^ uint64(length)), mix(two)
        if functions == 0:
            continue

        smallest[:] = uint32(0xFFFFFFFF)
        size = min(SHINGLE, length)
        for start in range(length - size + 1):
            hashed = uint64(size)
            for i in range(start, start + size):
                hashed = (hashed ^ uint64(record[i])) * uint64(0x9E3779B97F4A7C15)
                hashed = hashed ^ (hashed >> uint64(29))
            shingle = uint32(mix(hashed))
            # 32 bits all through: eight at a time on a processor with vectors of 256.
            for f in range(functions):
                value = uint32(uint32(shingle ^ added[f]) * factors[f])
                value = uint32(uint32(value ^ uint32(value >> uint32(15))) * second_factors[f])
                smallest[f] = min(smallest[f], value)
        for band in range(functions // rows):
            key = mix(band + 1)
            for i in range(band * rows, (band + 1) * rows):
                key = mix(key ^ uint64(smallest[i])) + uint64(i)
            keys[row, band] = key


@compiled
def join_pairs(parent: npt.NDArray[np.uint32], pairs: npt.NDArray[np.uint32]) -> None:
    for i in range(len(pairs)):
        a, b = pairs[i, 0], pairs[i, 1]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        else:
            parent[a] = b


@compiled
def point_to_firsts(parent: npt.NDArray[np.uint32]) -> None:
    # A parent never comes after its child, so one pass in order is enough.
    for i in range(len(parent)):
        parent[i] = parent[parent[i]]


@njit(inline="always")
def _rolled(value: Any, by: Any) -> Any:
    return (value << uint64(by)) | (value >> uint64(64 - by))


@njit(inline="always")
def _same(a: Any, a_start: Any, b: Any, b_start: Any, n: Any) -> Any:
    for i in range(n):  # noqa: SIM110
        if a[a_start + i] != b[b_start + i]:
            return False
    return True


@njit(inline="always")
def _word(bitmap: Any, hashed: Any) -> Any:
    """Which word of the bitmap is that of a hash: by its middle bits, as the lowest choose the slot."""
    return (hashed >> uint64(24)) & uint64(len(bitmap) - 1)


@njit(inline="always")
def _marks(hashed: Any) -> Any:
    """The three bits of that word that a hash sets: by its highest bits."""
    one = uint64(1)
    return (
        (one << (hashed >> uint64(58)))
        | (one << (hashed >> uint64(52) & uint64(63)))
        | (one << (hashed >> uint64(46) & uint64(63)))
    )


@compiled
def number_runs(
    tokens: Any, starts: Any, n: Any, hashes: Any, runs: Any, bitmap: Any, run_at: Any, start_of: Any
) -> Any:
    found = 0
    last_slot = uint64(len(hashes) - 1)
    for piece in range(len(starts) - 1):
        hashed = uint64(0)
        for i in range(starts[piece], starts[piece + 1]):
            hashed = _rolled(hashed, 1) ^ mix(tokens[i] + 1)
            start = i - n + 1
            if start < starts[piece]:
                continue
            if start > starts[piece]:
                hashed = hashed ^ _rolled(mix(tokens[start - 1] + 1), n)
            slot = hashed & last_slot
            while runs[slot] >= 0:
                if hashes[slot] == hashed and _same(tokens, start_of[runs[slot]], tokens, start, n):
                    break
                slot = (slot + uint64(1)) & last_slot
            if runs[slot] < 0:
                hashes[slot], runs[slot], start_of[found] = hashed, found, start
                bitmap[_word(bitmap, hashed)] |= _marks(hashed)
                found += 1
            run_at[start] = runs[slot]
    return found


@compiled
def scan_rows(
    tokens: Any,
    inst_start: Any,
    inst_len: Any,
    resp_start: Any,
    resp_len: Any,
    row: Any,
    scanned: Any,
    n: Any,
    questions: Any,
    start_of: Any,
    hashes: Any,
    runs: Any,
    bitmap: Any,
    records: Any,
    last_record: Any,
    common: Any,
    record: Any,
    mixed: Any,
    pairs: Any,
) -> Any:
    """Scan rows from ``row`` on until the buffer might not hold the next; returns that row and the pairs written."""
    written = 0
    last_slot = uint64(len(hashes) - 1)
    while row < len(inst_len):
        prefix = inst_len[row]
        length = prefix + resp_len[row]
        if common and written + length > len(pairs):
            break
        for i in range(prefix):
            record[i] = tokens[inst_start[row] + i]
        for i in range(resp_len[row]):
            record[prefix + i] = tokens[resp_start[row] + i]
        hashed = uint64(0)
        for i in range(length):
            mixed[i] = mix(record[i] + 1)
            hashed = _rolled(hashed, 1) ^ mixed[i]
            start = i - n + 1
            if start < 0:
                continue
            if start > 0:
                hashed = hashed ^ _rolled(mixed[start - 1], n)
            marks = _marks(hashed)
            if bitmap[_word(bitmap, hashed)] & marks != marks:
                continue
            slot = hashed & last_slot
            while runs[slot] >= 0:
                run = runs[slot]
                if hashes[slot] == hashed and _same(questions, start_of[run], record, start, n):
                    if last_record[run] != scanned + row:
                        last_record[run] = scanned + row
                        records[run] += 1
                        if records[run] <= common:
                            pairs[written, 0], pairs[written, 1] = scanned + row, run
                            written += 1
                    break
                slot = (slot + uint64(1)) & last_slot
        row += 1
    return row, written
