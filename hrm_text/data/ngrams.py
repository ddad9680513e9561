"""Runs of n tokens of some questions, looked for in the records of a token store.

The runs of each n lie in a hash table, open addressing, at most half full: a 64-bit hash and the number of the run. A
hash that is rolled along a record (Cohen 1997, "Recursive hashing functions for n-grams": cyclic polynomials) is looked
up in a bitmap first, which few runs of an unrelated record pass, and which stays in the processor's cache. A hit is
compared token by token, so a match is a match: no hash decides.

15 million tokens of questions take 0.7 GB for each n, of which 0.1 GB a worker; all benchmarks of the evaluation
together have about half of that.

Compiled by numba on first use (hashing_kernels.py); do not import this module where nothing is looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hrm_text.data.hashing_kernels import number_runs, scan_rows
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
    found = number_runs(tokens, starts, n, hashes, runs, bitmap, run_at, start_of)
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
                row, written = scan_rows(
                    tokens, *columns, row, self._scanned, table.n, table.tokens, table.start_of, table.hashes,
                    table.runs, table.bitmap, records, last_record, common, record, mixed, pairs,
                )  # fmt: skip
                if written:
                    found.append(pairs[:written].copy())
        self._scanned += len(spans)
        return found
