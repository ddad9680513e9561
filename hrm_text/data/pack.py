"""Packing: which whole samples share a batch, so that every rank gets the same number of tokens to work on."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError


@dataclass(frozen=True, slots=True)
class EpochIndex:
    """Where the samples of one epoch lie in the token file, in the order in which they are trained on.

    A sample is a prefix, ``inst_len`` tokens from ``inst_start``, and a response, ``resp_len`` from ``resp_start``.
    """

    inst_start: npt.NDArray[np.int64]
    """[N]"""
    inst_len: npt.NDArray[np.int64]
    """[N]; at least 1."""
    resp_start: npt.NDArray[np.int64]
    """[N]"""
    resp_len: npt.NDArray[np.int64]
    """[N]; counts the end token; 0 is a prefix alone."""

    def __len__(self) -> int:
        return len(self.inst_len)

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> EpochIndex:
        """The chosen samples alone."""
        return EpochIndex(self.inst_start[rows], self.inst_len[rows], self.resp_start[rows], self.resp_len[rows])

    @property
    def sample_lengths(self) -> npt.NDArray[np.int64]:
        """[N]; input tokens of each sample: the prefix, and the response without its last token."""
        return self.inst_len + np.maximum(self.resp_len - 1, 0)


def read_epoch(sampled: Path, epoch: int) -> EpochIndex:
    """Open the index of one epoch of a sampled folder: memory maps where the files are int64, copies otherwise.

    Raises:
        UserError: a file is missing, damaged, or no row of integers, or the four differ in length.
    """
    folder = sampled / f"epoch_{epoch}"
    names = ("inst_start", "inst_len", "resp_start", "resp_len")
    columns = [np.asarray(read_integers(folder / f"{name}.npy"), np.int64) for name in names]
    if len({len(column) for column in columns}) != 1:
        found = ", ".join(f"{name} {len(column):,}" for name, column in zip(names, columns, strict=True))
        raise UserError(f"{folder}: the four index files must have one row per sample each; found {found} rows")
    return EpochIndex(*columns)


def read_integers(path: Path) -> npt.NDArray[np.integer]:
    """Map a one-dimensional ``.npy`` file of any integer type into memory, read-only.

    The plain array over the map comes back: indexing an ``np.memmap`` costs twice as much for
    1,000 tokens and seven times as much for 20.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a sampled folder is made by `hrm-text data sample`") from None
    except (ValueError, EOFError, OSError) as error:
        # An empty array cannot be mapped, only read.
        array = _read_empty(path)
        if array is None:
            raise UserError(f"{path}: not a readable .npy file ({error}); write the folder again") from None
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path}: expected a row of integers, found {array.dtype} of shape {array.shape}")
    return np.asarray(array)


def _read_empty(path: Path) -> npt.NDArray[np.integer] | None:
    try:
        array = np.load(path)
    except (ValueError, EOFError, OSError):
        return None
    return array if array.size == 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class Packing(Sequence[list[npt.NDArray[np.int64]]]):
    """The batches of an epoch: ``packing[step][b]`` are the indices of the samples in bin b of that step.

    Every step takes the next run of samples, so one small integer per sample, its bin, holds the whole plan. Within a
    bin the samples keep their order.
    """

    bins: int
    step_starts: npt.NDArray[np.int64]
    """[steps + 1]; step i takes the samples step_starts[i] to step_starts[i + 1]."""
    bin_of_sample: npt.NDArray[np.unsignedinteger]
    """[N]"""

    def __len__(self) -> int:
        return len(self.step_starts) - 1

    @overload
    def __getitem__(self, step: int) -> list[npt.NDArray[np.int64]]: ...

    @overload
    def __getitem__(self, step: slice) -> list[list[npt.NDArray[np.int64]]]: ...

    def __getitem__(self, step: int | slice) -> list[npt.NDArray[np.int64]] | list[list[npt.NDArray[np.int64]]]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        run = self.run(step)
        bins = self.bin_of_sample[run]
        order = run.start + np.argsort(bins, kind="stable")
        return np.split(order, np.cumsum(np.bincount(bins, minlength=self.bins))[:-1])

    def run(self, step: int) -> slice:
        """The samples of a step over all bins."""
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        step %= len(self)
        return slice(int(self.step_starts[step]), int(self.step_starts[step + 1]))


def pack_epoch(lengths: npt.NDArray[np.int64], capacity: int, bins: int) -> Packing:
    """Cut an epoch into steps of ``bins`` bins of at most ``capacity`` tokens each, whole samples only.

    A step takes the largest next run of samples that LPT (longest processing time first) fits. Every sample is in
    exactly one bin, and the same lengths give the same plan. The last step takes what is left and may leave bins empty.

    Args:
        lengths: [N]; tokens of each sample, in epoch order, each at least 1.
        capacity: tokens that a bin holds.
        bins: bins of a step.

    Raises:
        UserError: a sample is longer than ``capacity``.
    """
    assert min(capacity, bins) >= 1, (capacity, bins)
    if len(lengths) and lengths.max() > capacity:
        longest = int(lengths.argmax())
        raise UserError(
            f"sample {longest} has {lengths[longest]:,} tokens, a micro-batch holds {capacity:,}, and samples are "
            "never cut here; take larger batches, or sample the data again with a smaller max_seq_len"
        )
    tokens_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    step_starts = [0]
    bin_of_sample = np.empty(len(lengths), np.min_scalar_type(bins - 1))
    while (start := step_starts[-1]) < len(lengths):
        # No run can hold more than this: its tokens alone would exceed all bins together.
        end = int(np.searchsorted(tokens_before, tokens_before[start] + bins * capacity, side="right")) - 1
        assigned = _largest_fit(lengths[start:end], capacity, bins)
        bin_of_sample[start : start + len(assigned)] = assigned
        step_starts.append(start + len(assigned))
    return Packing(bins, np.array(step_starts, np.int64), bin_of_sample)


def _largest_fit(lengths: npt.NDArray[np.int64], capacity: int, bins: int) -> npt.NDArray[np.int64]:
    """The bins, under LPT, of the samples of the longest beginning of ``lengths`` that fits.

    LPT comes within a few samples of the bound that ``lengths`` is, so the search leaps down from it, 1, 2, 4, ...
    samples at a time, and bisects the last leap. (LPT is not quite monotone: in rare cases a run fits although a
    shorter one does not. The run found is one that fits and whose next larger one does not.)
    """
    longest_first = np.argsort(-lengths, kind="stable")
    scaled = lengths * bins

    def fit(n: int) -> npt.NDArray[np.int64] | None:
        order = longest_first[longest_first < n]
        assigned = _longest_first(scaled[order].tolist(), capacity, bins)
        if assigned is None:
            return None
        in_order = np.empty(n, np.int64)
        in_order[order] = assigned
        return in_order

    too_many, leap = len(lengths) + 1, 1
    fitting: npt.NDArray[np.int64] | None = None
    while fitting is None:
        # As many samples as bins always fit, so the search ends there.
        n = max(too_many - leap, min(bins, len(lengths)))
        fitting = fit(n)
        if fitting is None:
            too_many, leap = n, 2 * leap
    while too_many - len(fitting) > 1:
        n = (too_many + len(fitting)) // 2
        found = fit(n)
        if found is None:
            too_many = n
        else:
            fitting = found
    return fitting


def _longest_first(scaled_lengths: list[int], capacity: int, bins: int) -> list[int] | None:
    """Put each length in turn in the least filled bin (ties: the lowest bin); None once one does not fit.

    Lengths come multiplied by ``bins``: load * bins + bin is then one integer that sorts as the pair does.
    """
    heap = list(range(bins))
    over = (capacity + 1) * bins
    assigned = []
    for length in scaled_lengths:
        least = heap[0]
        if least + length >= over:
            return None
        assigned.append(least % bins)
        heapq.heapreplace(heap, least + length)
    return assigned
