"""Packing: which whole samples share a batch, so that every rank gets the same number of tokens to work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.storage import Location, read_integers, under


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

    def __getitem__(self, rows: slice | npt.NDArray[np.signedinteger]) -> EpochIndex:
        """The chosen samples alone."""
        return EpochIndex(self.inst_start[rows], self.inst_len[rows], self.resp_start[rows], self.resp_len[rows])

    @property
    def sample_lengths(self) -> npt.NDArray[np.int64]:
        """[N]; input tokens of each sample: the prefix, and the response without its last token."""
        return self.inst_len + np.maximum(self.resp_len - 1, 0)


def read_epoch(sampled: Location, epoch: int) -> EpochIndex:
    """Open the index of one epoch of a sampled folder: memory maps where the files are int64, copies otherwise.

    Raises:
        UserError: a file is missing, damaged, or no row of integers, or the four differ in length.
    """
    folder = under(sampled, f"epoch_{epoch}")
    names = ("inst_start", "inst_len", "resp_start", "resp_len")
    columns = [np.asarray(read_integers(under(folder, f"{name}.npy")), np.int64) for name in names]
    if len({len(column) for column in columns}) != 1:
        found = ", ".join(f"{name} {len(column):,}" for name, column in zip(names, columns, strict=True))
        raise UserError(f"{folder}: the four index files must have one row per sample each; found {found} rows")
    return EpochIndex(*columns)


@dataclass(frozen=True, slots=True, eq=False)
class Packing(Sequence[list[npt.NDArray[np.int64]]]):
    """The batches of an epoch: ``packing[step][b]`` are the indices of the samples in bin b of that step.

    Every step takes the next run of ``order``, so that and one small integer per sample, its bin, hold the whole plan.
    Within a bin the samples keep the epoch's order.
    """

    bins: int
    step_starts: npt.NDArray[np.int64]
    """[steps + 1]; step i takes the samples in the places step_starts[i] to step_starts[i + 1] of ``order``."""
    bin_of_sample: npt.NDArray[np.unsignedinteger]
    """[N]; of the sample in each place of ``order``."""
    order: npt.NDArray[np.signedinteger] | None = None
    """[N]; the epoch's samples, step after step, rising within a step; None is the epoch's own order."""

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
        by_bin = run.start + np.argsort(bins, kind="stable")
        samples = by_bin if self.order is None else self.order[by_bin].astype(np.int64)
        return np.split(samples, np.cumsum(np.bincount(bins, minlength=self.bins))[:-1])

    def samples(self, step: int) -> slice | npt.NDArray[np.signedinteger]:
        """The samples of a step over all bins, in the epoch's order."""
        run = self.run(step)
        return run if self.order is None else self.order[run]

    def sums(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[steps, bins]; the sum of the values [N] of the samples in each bin."""
        sums = np.zeros((len(self), self.bins), np.int64)
        for step in range(len(self)):
            np.add.at(sums[step], self.bin_of_sample[self.run(step)], values[self.samples(step)])
        return sums

    def run(self, step: int) -> slice:
        """The places of a step in ``order``."""
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
    if bins == 1:
        return _cut_for_one_bin(lengths, capacity)
    from hrm_text.data.packing_kernels import cut_into_steps

    step_starts = np.empty(len(lengths) + 1, np.int64)
    bin_of_sample = np.empty(len(lengths), np.min_scalar_type(bins - 1))
    steps = cut_into_steps(np.ascontiguousarray(lengths, np.int64), capacity, bins, step_starts, bin_of_sample)
    return Packing(bins, step_starts[: steps + 1].copy(), bin_of_sample)


def _cut_for_one_bin(lengths: npt.NDArray[np.int64], capacity: int) -> Packing:
    """Each step is the longest next run that fits: there is nothing to choose, and nothing to compile."""
    tokens_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    step_starts = [0]
    while step_starts[-1] < len(lengths):
        full = tokens_before[step_starts[-1]] + capacity
        step_starts.append(int(np.searchsorted(tokens_before, full, side="right")) - 1)
    return Packing(1, np.array(step_starts, np.int64), np.zeros(len(lengths), np.uint8))
