"""The plan of an epoch: cut into steps and bins by tokens, then bins evened out by the work of attention.

Equal tokens are not equal work: attention looks at every pair of positions that see each other, and the ranks of a step
wait for the slowest. The bin of a very long sample has more work than any other, whatever else it holds, so within a
window of a few steps the samples of the most work are brought together, one for each bin of the same step. Then the
samples of a step are exchanged between its bins until the work is even, tokens nearly kept. Bins are numbered by
falling work: a turn, one bin for each rank, holds bins that lie next to each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.pack import Packing, pack_epoch
from hrm_text.files import whole_file

PLAN_VERSION = 2
"""Of the algorithm: another number, and plans on the disk are made again."""
_WORTH_KEEPING = 100_000
"""Samples from which on a plan is kept on the disk: below, making it takes less than a second."""
_WINDOW = 4
"""Steps among which samples are regrouped. At 16 bins of 12,288 tokens and the lengths of the published mixture the
most work is 62 % above the mean by tokens alone; exchanges by themselves leave 34 %, after windows of 2 steps 12 %, of
3 5 %, of 4 2.5 %, of 8 0.5 %. Attention is but a part of a step's time, so more than 4 would gain little."""
_STEPS_AT_ONCE = 1024
"""Steps whose samples are held in memory at a time, a multiple of the window."""

Lengths = npt.NDArray[np.int64]


def attention_work(lengths: Lengths, prefix_lengths: Lengths) -> npt.NDArray[np.int64]:
    """[N]; the pairs of positions that see each other: all of the prefix, then each position all before it and itself.

    With prefix p of length l: p^2 + (l - p) p + (l - p)(l - p + 1) / 2.
    """
    responses = lengths - prefix_lengths
    return prefix_lengths * lengths + responses * (responses + 1) // 2


def plan_epoch(
    lengths: Lengths, prefix_lengths: Lengths, capacity: int, bins: int, cache: Path | None = None
) -> Packing:
    """The batches of an epoch. The same lengths give the same plan, whatever the number of ranks.

    Args:
        lengths: [N]; tokens of each sample, in epoch order, each at least 1.
        prefix_lengths: [N]; how many leading tokens of each see each other in both directions; 0 is causal.
        capacity: tokens that a bin holds.
        bins: bins of a step.
        cache: folder to keep plans in; one that may not be written to is fine.

    Raises:
        UserError: a sample is longer than ``capacity``.
    """
    if bins == 1:
        return pack_epoch(lengths, capacity, 1)
    kept = None
    if cache is not None and len(lengths) >= _WORTH_KEEPING:
        kept = cache / f"{plan_key(lengths, prefix_lengths, capacity, bins)}.npz"
        if (packing := _read(kept, bins, len(lengths))) is not None:
            return packing
    packing = balance_packing(pack_epoch(lengths, capacity, bins), lengths, prefix_lengths, capacity)
    if kept is not None:
        order = packing.order if packing.order is not None else np.empty(0, np.int32)
        with contextlib.suppress(UserError, OSError), whole_file(kept) as beside, beside.open("wb") as file:
            np.savez(file, step_starts=packing.step_starts, bin_of_sample=packing.bin_of_sample, order=order)
    return packing


def balance_packing(packing: Packing, lengths: Lengths, prefix_lengths: Lengths, capacity: int) -> Packing:
    """Regroup the samples of each window of steps, then even out the work of the bins of each step.

    The steps stay as many. The last one, which holds what is left, keeps its samples, and so do those before it that do
    not fill a window.
    """
    from hrm_text.data.packing_kernels import balance_steps, regroup_steps

    step_starts, bin_of_sample = packing.step_starts.copy(), packing.bin_of_sample.copy()
    order = np.arange(len(lengths), dtype=_order_type(len(lengths)))
    regrouped = False
    for first in range(0, len(packing), _STEPS_AT_ONCE):
        starts = step_starts[first : first + _STEPS_AT_ONCE + 1]
        run = slice(starts[0], starts[-1])
        of_steps, offset = np.ascontiguousarray(lengths[run], np.int64), starts[0]
        work = attention_work(of_steps, np.asarray(prefix_lengths[run], np.int64))
        starts -= offset
        whole = starts[: len(packing) - first]
        regrouped |= regroup_steps(
            of_steps, work, capacity, packing.bins, _WINDOW, whole, bin_of_sample[run], order[run]
        )
        chosen = order[run] - offset
        balance_steps(of_steps[chosen], work[chosen], capacity, packing.bins, starts, bin_of_sample[run])
        starts += offset
    return Packing(packing.bins, step_starts, bin_of_sample, order if regrouped else None)


def _order_type(samples: int) -> type[np.signedinteger]:
    return np.int32 if samples < 2**31 else np.int64


def plan_key(lengths: Lengths, prefix_lengths: Lengths, capacity: int, bins: int) -> str:
    """What a plan depends on, as hexadecimal digits: copies of a folder share it, a changed length does not."""
    digest = hashlib.blake2b(f"{PLAN_VERSION} {capacity} {bins} ".encode(), digest_size=16)
    for column in (lengths, prefix_lengths):
        digest.update(np.ascontiguousarray(column, np.int64).data)
    return digest.hexdigest()


def _read(path: Path, bins: int, samples: int) -> Packing | None:
    """A plan from the disk; None where there is none that can be right."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            step_starts, bin_of_sample = arrays["step_starts"], arrays["bin_of_sample"]
            order = arrays["order"] if arrays["order"].size else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    sound = (
        step_starts.dtype == np.int64
        and bin_of_sample.dtype == np.min_scalar_type(bins - 1)
        and bin_of_sample.shape == (samples,)
        and step_starts.ndim == 1
        and len(step_starts) > 1
        and step_starts[0] == 0
        and step_starts[-1] == samples
        and bool((np.diff(step_starts) > 0).all())
        and bin_of_sample.max() < bins
        and (order is None or _is_permutation(order, samples))
    )
    return Packing(bins, step_starts, bin_of_sample, order) if sound else None


def _is_permutation(order: npt.NDArray[np.generic], samples: int) -> bool:
    if order.dtype != _order_type(samples) or order.shape != (samples,):
        return False
    return int(order.min()) >= 0 and bool((np.bincount(order, minlength=samples) == 1).all())


@dataclass(frozen=True, slots=True)
class PackingMeasures:
    """How full and how even the steps of a plan are, the last one, which holds what is left, not counted."""

    steps: int
    full: float
    """Tokens over what the bins hold."""
    token_spread: float
    """Of the bins of a turn: most less least, over the mean; the mean over the turns."""
    work_excess: float
    """Of the bins of a turn: how far the most work of attention is above the mean, as a part of it; the mean over the
    turns."""
    least_excess: float
    """What no exchange gets ``work_excess`` below: the bin of the sample of the most work has that much work at least.
    Only of steps of one turn; 0 otherwise."""


def packing_report(
    lengths: Lengths, prefix_lengths: Lengths, capacity: int, bins: int, num_ranks: int | None = None
) -> dict[str, PackingMeasures]:
    """Measure the packing by tokens alone (``"tokens"``) and the plan (``"balanced"``).

    Args:
        lengths: [N]; tokens of each sample.
        prefix_lengths: [N]
        capacity: tokens that a bin holds.
        bins: bins of a step.
        num_ranks: bins of a turn; all bins of a step by default.
    """
    work = attention_work(lengths, prefix_lengths)
    plans = {
        "tokens": pack_epoch(lengths, capacity, bins),
        "balanced": plan_epoch(lengths, prefix_lengths, capacity, bins),
    }
    return {name: _measure(plan, lengths, work, capacity, num_ranks or bins) for name, plan in plans.items()}


def _measure(plan: Packing, lengths: Lengths, work: Lengths, capacity: int, num_ranks: int) -> PackingMeasures:
    steps = len(plan) - 1
    if steps < 1:
        raise UserError("packing report: the samples fill less than one step; take more samples")
    tokens, of_step = (plan.sums(values)[:-1].astype(np.float64) for values in (lengths, work))
    tokens, of_turn = tokens.reshape(-1, num_ranks), of_step.reshape(-1, num_ranks)
    heaviest = np.array([work[plan.samples(step)].max() for step in range(steps)])
    turns = plan.bins // num_ranks
    return PackingMeasures(
        steps=steps,
        full=float(tokens.sum() / (steps * plan.bins * capacity)),
        token_spread=float(((tokens.max(axis=1) - tokens.min(axis=1)) / tokens.mean(axis=1)).mean()),
        work_excess=float((of_turn.max(axis=1) / of_turn.mean(axis=1) - 1).mean()),
        least_excess=float(np.maximum(heaviest / of_step.mean(axis=1) - 1, 0).mean()) if turns == 1 else 0.0,
    )
