"""Runs of n tokens of some questions, looked for in the records of a token store.

The runs of each n lie in a hash table, open addressing, at most half full: a 64-bit hash and the number of the run. A
hash that is rolled along a record (Cohen 1997, "Recursive hashing functions for n-grams": cyclic polynomials) is looked
up in a bitmap first, which few runs of an unrelated record pass, and which stays in the processor's cache. A hit is
compared token by token, so a match is a match: no hash decides.

15 million tokens of questions take 0.7 GB for each n, of which 0.1 GB a worker; all benchmarks of the evaluation
together have about half of that.

Compiled by numba on first use (a few seconds); do not import this module where nothing is looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

from hrm_text.data.minhash import mix
from hrm_text.data.pack import EpochIndex

_FILTER_BITS = 16
"""Of the bitmap, for each run: of an unrelated record, about one run in 100 passes."""
_BUFFER_PAIRS = 1 << 18


@dataclass(frozen=True, slots=True)
class Ngrams:
    """The runs of n tokens of some pieces of text."""

    n: int
    tokens: npt.NDArray[np.uint32]
    """[Q]; all pieces, end to end."""
    run_at: npt.NDArray[np.int32]
    """[Q]; the number of the run that starts at each position; -1 where the piece ends before the run does."""
    start_of: npt.NDArray[np.int32]
    """[G]; where each run stands first; runs are numbered in that order."""
    hashes: npt.NDArray[np.uint64]
    """[slots]"""
    runs: npt.NDArray[np.int32]
    """[slots]; the number of the run, or -1."""
    bitmap: npt.NDArray[np.uint64]
    """[words]"""

    def save(self, folder: Path) -> None:
        """Write the arrays, for workers to map into memory."""
        for name in ("tokens", "run_at", "start_of", "hashes", "runs", "bitmap"):
            np.save(folder / f"{name}_{self.n}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path, n: int) -> Ngrams:
        """Map what ``save`` wrote."""
        names = ("tokens", "run_at", "start_of", "hashes", "runs", "bitmap")
        # Mapped read-only, and shared by the workers of a machine; an empty array cannot be mapped.
        paths = [folder / f"{name}_{n}.npy" for name in names]
        arrays = [np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > 1024 else None)) for path in paths]
        return cls(n, *arrays)


def build_ngrams(tokens: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64], n: int) -> Ngrams:
    """Number the runs of n tokens of some pieces.

    Args:
        tokens: [Q]; the pieces, end to end.
        starts: [pieces + 1]; where each piece starts, then Q.
        n: length of a run, 1 to 63.
    """
    assert 1 <= n <= 63 and starts[-1] == len(tokens) < 1 << 31
    run_count = int(np.maximum(np.diff(starts) - n + 1, 0).sum())
    slots = 1 << max(4, (2 * run_count - 1).bit_length())
    words = max(1, 1 << max(6, (_FILTER_BITS * run_count - 1).bit_length()) >> 6)
    hashes, runs = np.zeros(slots, np.uint64), np.full(slots, -1, np.int32)
    bitmap = np.zeros(words, np.uint64)
    run_at, start_of = np.full(len(tokens), -1, np.int32), np.empty(run_count, np.int32)
    found = _number_runs(tokens, starts, n, hashes, runs, bitmap, run_at, start_of)
    return Ngrams(n, tokens, run_at, start_of[:found].copy(), hashes, runs, bitmap)


class Matches:
    """What a scan has found so far: in how many records each run stands."""

    def __init__(self, tables: Sequence[Ngrams], noted: int, common: int) -> None:
        """Nothing yet.

        Args:
            tables: of each n that is looked for.
            noted: the n whose matches are noted record by record.
            common: a run that stands in more records than these is not noted any further.
        """
        self._tables = tables
        self._noted = noted
        self._common = common
        self._scanned = 0
        self._last_record = [np.full(len(table.start_of), -1, np.int32) for table in tables]
        self.records = [np.zeros(len(table.start_of), np.uint32) for table in tables]
        """Of each n: [G]; in how many records each run stands."""

    def scan(self, tokens: npt.NDArray[np.integer], spans: EpochIndex) -> list[npt.NDArray[np.int32]]:
        """Look for the runs in some more records, prefix and response taken as one.

        Returns:
            Arrays of [N, 2]: the number of a record, counted from the first that was scanned, and a run of the n that
            is noted that stands in it.
        """
        longest = int((spans.inst_len + spans.resp_len).max()) if len(spans) else 0
        record, mixed = np.empty(longest, np.uint32), np.empty(longest, np.uint64)
        columns = (spans.inst_start, spans.inst_len, spans.resp_start, spans.resp_len)
        found = []
        for table, records, last_record in zip(self._tables, self.records, self._last_record, strict=True):
            common = self._common if table.n == self._noted else 0
            # Any record fits: it has no more runs than tokens.
            pairs = np.empty((max(longest, _BUFFER_PAIRS) if common else 0, 2), np.int32)
            row = 0
            while row < len(spans):
                row, written = _scan(
                    tokens, *columns, row, self._scanned, table.n, table.tokens, table.start_of, table.hashes,
                    table.runs, table.bitmap, records, last_record, common, record, mixed, pairs,
                )  # fmt: skip
                if written:
                    found.append(pairs[:written].copy())
        self._scanned += len(spans)
        return found


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


@njit(nogil=True)
def _number_runs(
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


@njit(nogil=True)
def _scan(
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
