"""Hashes of records: one of the whole, and MinHash bands that similar records are likely to share.

The shingles of a record are its runs of 5 tokens. Of each of bands x rows hash functions, the smallest value over the
shingles is kept (Broder 1997, "On the resemblance and containment of documents"): two records agree in one with
probability s, their Jaccard similarity. A band is a few of these together, so that records of similarity s share one or
more of b bands of r rows with probability 1 - (1 - s^r)^b. With 14 bands of 8 rows:

    s      0.4    0.5    0.6    0.7    0.75   0.8    0.85   0.9    0.95
    found  0.9 %  5.3 %  21 %   56 %   77 %   92 %   99 %   99.97 %  100 %

Compiled by numba on first use (a few seconds); do not import this module where nothing is hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from numba import njit, uint32, uint64
from pydantic import Field

from hrm_text.data.pack import EpochIndex
from hrm_text.settings import settings

SHINGLE = 5
"""Tokens."""


@settings
class Bands:
    """How MinHash values are put together."""

    bands: Annotated[int, Field(ge=1, le=64)] = 14
    rows: Annotated[int, Field(ge=1, le=64)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    def chance(self, similarity: float) -> float:
        """That two records of this Jaccard similarity share a band."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


@dataclass(frozen=True, slots=True)
class RecordHashes:
    """The hashes of R records."""

    whole: npt.NDArray[np.uint64]
    """[R, 2]; equal records have equal ones."""
    bands: npt.NDArray[np.uint64]
    """[R, bands]; the number of the band is hashed in, so that only equal bands are equal."""


def hash_records(tokens: npt.NDArray[np.integer], spans: EpochIndex, bands: Bands | None) -> RecordHashes:
    """Hash records: the tokens of the prefix and of the response after it, and how long the prefix is.

    A record shorter than a shingle is one shingle. Without ``bands`` the second array is [R, 0].

    Args:
        tokens: of the folder.
        spans: of R records; checked, for nothing is checked here.
        bands: of MinHash.
    """
    longest = int((spans.inst_len + spans.resp_len).max()) if len(spans) else 0
    record = np.empty(longest, np.uint32)
    whole = np.empty((len(spans), 2), np.uint64)
    keys = np.empty((len(spans), bands.bands if bands else 0), np.uint64)
    constants = _constants(bands) if bands else np.empty((3, 0), np.uint32)
    columns = (spans.inst_start, spans.inst_len, spans.resp_start, spans.resp_len)
    _hash_records(tokens, *columns, constants, bands.rows if bands else 1, record, whole, keys)
    return RecordHashes(whole, keys)


def _constants(bands: Bands) -> npt.NDArray[np.uint32]:
    """[3, functions]; what each hash function adds and multiplies with."""
    rng = np.random.Generator(np.random.Philox(seed=bands.seed))
    constants = rng.integers(0, 1 << 32, (3, bands.bands * bands.rows), np.uint32)
    constants[1:] |= np.uint32(1)  # odd factors lose no bit
    return constants


@njit(inline="always")
def mix(value: Any) -> Any:
    """A bijection of 64 bits in which every bit reaches every other: the finaliser of MurmurHash3."""
    value = uint64(value)
    value = (value ^ (value >> uint64(33))) * uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> uint64(33))) * uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> uint64(33))


@njit(nogil=True)
def _hash_records(
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


class Groups:
    """Groups of records, joined pair by pair: a union-find over record numbers, 4 bytes each.

    The first record of a group stands for it, so the groups do not depend on the order of the pairs.
    """

    def __init__(self, records: int) -> None:
        """Every record is a group of its own."""
        assert records < 1 << 32
        self._parent = np.arange(records, dtype=np.uint32)

    def join(self, pairs: npt.NDArray[np.uint32]) -> None:
        """Join the groups of each pair, [N, 2]."""
        _join(self._parent, pairs)

    def firsts(self) -> npt.NDArray[np.uint32]:
        """[records]; the first record of the group of each. The array is the groups' own."""
        _flatten(self._parent)
        return self._parent


@njit(nogil=True)
def _join(parent: npt.NDArray[np.uint32], pairs: npt.NDArray[np.uint32]) -> None:
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


@njit(nogil=True)
def _flatten(parent: npt.NDArray[np.uint32]) -> None:
    # A parent never comes after its child, so one pass in order is enough.
    for i in range(len(parent)):
        parent[i] = parent[parent[i]]


def join_equal(
    keys: Sequence[npt.NDArray[np.uint64]], numbers: npt.NDArray[np.uint32]
) -> tuple[list[npt.NDArray[np.uint64]], npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Sort records by key and keep the first of those that agree in it.

    Args:
        keys: arrays of [N], compared in this order.
        numbers: [N], of the records; those of equal keys ascend.

    Returns:
        The keys, each [K], and numbers, [K], of the first records, sorted by key; and [N - K, 2], each first record
        with each later one of the same keys.
    """
    order = np.lexsort(tuple(reversed(keys)))  # stable
    numbers = numbers[order]
    is_first = np.zeros(len(order), np.bool_)
    is_first[:1] = True
    sorted_keys = [key[order] for key in keys]
    for key in sorted_keys:
        is_first[1:] |= key[1:] != key[:-1]
    firsts = numbers[is_first]
    later = ~is_first
    pairs = np.stack((firsts[np.cumsum(is_first)[later] - 1], numbers[later]), axis=1)
    return [key[is_first] for key in sorted_keys], firsts, pairs
