"""Hashes of records: one of the whole, and MinHash bands that similar records are likely to share.

The shingles of a record are its runs of 5 tokens. Of each of bands x rows hash functions, the smallest value over the
shingles is kept (Broder 1997, "On the resemblance and containment of documents"): two records agree in one with
probability s, their Jaccard similarity. A band is a few of these together, so that records of similarity s share one or
more of b bands of r rows with probability 1 - (1 - s^r)^b. With 14 bands of 8 rows:

    s      0.4    0.5    0.6    0.7    0.75   0.8    0.85   0.9    0.95
    found  0.9 %  5.3 %  21 %   56 %   77 %   92 %   99 %   99.97 %  100 %

Compiled by numba on first use (hashing_kernels.py); do not import this module where nothing is hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from hrm_text.data.hashing_kernels import hash_rows, join_pairs, point_to_firsts
from hrm_text.data.pack import EpochIndex
from hrm_text.settings import settings


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
    hash_rows(tokens, *columns, constants, bands.rows if bands else 1, record, whole, keys)
    return RecordHashes(whole, keys)


def _constants(bands: Bands) -> npt.NDArray[np.uint32]:
    """[3, functions]; what each hash function adds and multiplies with."""
    rng = np.random.Generator(np.random.Philox(seed=bands.seed))
    constants = rng.integers(0, 1 << 32, (3, bands.bands * bands.rows), np.uint32)
    constants[1:] |= np.uint32(1)  # odd factors lose no bit
    return constants


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
        join_pairs(self._parent, pairs)

    def firsts(self) -> npt.NDArray[np.uint32]:
        """[records]; the first record of the group of each. The array is the groups' own."""
        point_to_firsts(self._parent)
        return self._parent


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
