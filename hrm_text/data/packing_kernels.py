"""The compiled loops of packing. Importing this imports numba, which takes 0.6 s: only where something is packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

_MOST_GIVEN = 24
"""Samples of the bin with the most work that are tried for an exchange, those of the most work."""
_MOST_TAKEN = 48
"""Samples of the other bin that are tried for it, spread over all of its lengths."""
_MOST_TAKERS = 16
"""Bins that are asked to exchange with it, those of the least work."""
_CLOSE_ENOUGH = 1000
"""A step is balanced once no bin has more than a thousandth above the mean."""
_LOOKED_AT = 256
"""Samples ahead among which what still fits into a step is looked for."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on the first call, once for all processes where numba finds a folder for its cache.

    Next to this file, in the user's own or ``NUMBA_CACHE_DIR``: where none of them can be written, numba refuses.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@compiled
def longest_first(lengths: Any, order: Any, n: int, capacity: int, bins: int, heap: Any, assigned: Any) -> bool:
    """Put each of the first n samples, the longest first, in the least filled bin (ties: the lowest bin).

    Args:
        lengths: [m]; of the samples.
        order: [m]; all samples, the longest first.
        n: how many of them count: those whose number is below n.
        capacity: tokens of a bin.
        bins: how many.
        heap: [bins]; room to work in. load * bins + bin is one integer that sorts as the pair does.
        assigned: [m]; filled with the bins of the n samples.

    Returns:
        Whether all of them fit.
    """
    for b in range(bins):
        heap[b] = b
    over = (capacity + 1) * bins
    for sample in order:
        if sample >= n:
            continue
        least = heap[0]
        value = least + lengths[sample] * bins
        if value >= over:
            return False
        assigned[sample] = least % bins
        at = 0
        while True:
            child = 2 * at + 1
            if child >= bins:
                break
            if child + 1 < bins and heap[child + 1] < heap[child]:
                child += 1
            if heap[child] >= value:
                break
            heap[at] = heap[child]
            at = child
        heap[at] = value
    return True


@compiled
def cut_into_steps(lengths: Any, capacity: int, bins: int, step_starts: Any, bin_of_sample: Any) -> int:
    """Cut an epoch into steps, each the longest next run of samples that LPT fits.

    LPT comes within a few samples of the bound that the tokens set, so the search leaps down from it, 1, 2, 4, ...
    samples at a time, and bisects the last leap. (LPT is not quite monotone: in rare cases a run fits although a
    shorter one does not. The run found is one that fits and whose next larger one does not.)

    Args:
        lengths: [N], each at most ``capacity``.
        capacity: tokens of a bin.
        bins: bins of a step.
        step_starts: [N + 1]; filled with where each step starts, and N.
        bin_of_sample: [N]; filled.

    Returns:
        The number of steps.
    """
    total = len(lengths)
    heap = np.empty(bins, np.int64)
    step_starts[0] = 0
    start = steps = 0
    while start < total:
        # No run can hold more than this: its tokens alone would exceed all bins together.
        room, end = bins * capacity, start
        while end < total and lengths[end] <= room:
            room -= lengths[end]
            end += 1
        of_run = lengths[start:end]
        order = np.argsort(-of_run, kind="mergesort")
        found, tried = np.empty(len(of_run), np.int64), np.empty(len(of_run), np.int64)
        fitting, too_many, leap = 0, len(of_run) + 1, 1
        while fitting == 0:
            # As many samples as bins always fit, so the search ends there.
            n = max(too_many - leap, min(bins, len(of_run)))
            if longest_first(of_run, order, n, capacity, bins, heap, found):
                fitting = n
            else:
                too_many, leap = n, 2 * leap
        while too_many - fitting > 1:
            n = (too_many + fitting) // 2
            if longest_first(of_run, order, n, capacity, bins, heap, tried):
                found, tried, fitting = tried, found, n
            else:
                too_many = n
        bin_of_sample[start : start + fitting] = found[:fitting]
        start += fitting
        steps += 1
        step_starts[steps] = start
    return steps


@compiled
def regroup_steps(
    lengths: Any, work: Any, capacity: int, bins: int, window: int, step_starts: Any, bin_of_sample: Any, order: Any
) -> bool:
    """Bring the samples of the most work together within windows of steps: see ``packing_plan``.

    A window stays as it is where no sample has more work than the mean bin of its step, for then exchanges can even out
    the bins, and where a step of the new ones does not fit.

    Args:
        lengths: [N]
        work: [N]; of each sample.
        capacity: tokens of a bin.
        bins: bins of a step.
        window: steps of a window; what is left at the end stays as it is.
        step_starts: [steps + 1]; changed in place. Each step has ``bins`` samples or more.
        bin_of_sample: [N]; changed in place.
        order: [N]; the samples, step after step; changed in place.

    Returns:
        Whether anything changed.
    """
    changed = False
    for first in range(0, len(step_starts) - window, window):
        start, end = step_starts[first], step_starts[first + window]
        starts = step_starts[first : first + window + 1] - start
        of_window, work_of_window = lengths[start:end], work[start:end]
        alone = False
        for step in range(window):
            of_step = work_of_window[starts[step] : starts[step + 1]]
            alone |= of_step.max() * bins > of_step.sum()
        if not alone:
            continue
        step_of_sample = deal_heaviest(of_window, work_of_window, bins, starts)
        chosen = np.argsort(step_of_sample, kind="mergesort")
        starts[1:] = np.cumsum(np.bincount(step_of_sample, minlength=window))
        found = np.empty_like(bin_of_sample[start:end])
        fits = True
        for step in range(window):
            run = slice(starts[step], starts[step + 1])
            fits = fits and fit(of_window[chosen[run]], capacity, bins, found[run])
        if fits:
            step_starts[first : first + window + 1] = starts + start
            order[start:end] = order[start:end][chosen]
            bin_of_sample[start:end] = found
            changed = True
    return changed


@compiled
def deal_heaviest(lengths: Any, work: Any, bins: int, starts: Any) -> Any:
    """Which step of its window each sample goes to [n].

    The ``bins`` samples of the most work go to the step that had the most, the next to the one that had the next most:
    the order of the steps stays that of chance. All others fill one step after the other in their order, up to a fair
    share of the tokens; a step that the next sample would overfill takes the longest of those ahead that fit.

    Args:
        lengths: [n]; of the window's samples, at least ``bins`` in each step.
        work: [n]
        bins: bins of a step.
        starts: [steps + 1]; where each step started.
    """
    steps = len(starts) - 1
    load = np.zeros(steps, np.int64)
    for step in range(steps):
        load[step] = work[starts[step] : starts[step + 1]].sum()
    by_load, by_work = np.argsort(-load, kind="mergesort"), np.argsort(-work, kind="mergesort")
    step_of_sample = np.full(len(lengths), steps - 1, np.int64)
    waiting = np.ones(len(lengths), np.bool_)
    room = np.full(steps, -(-lengths.sum() // steps), np.int64)
    for place in range(steps * bins):
        sample, step = by_work[place], by_load[place // bins]
        step_of_sample[sample] = step
        waiting[sample] = False
        room[step] -= lengths[sample]
    others = np.flatnonzero(waiting)
    at = 0
    for step in range(steps - 1):
        while True:
            while at < len(others) and not waiting[others[at]]:
                at += 1
            sample = next_that_fits(lengths, others[at : at + _LOOKED_AT], waiting, room[step])
            if sample < 0:
                break
            step_of_sample[sample] = step
            waiting[sample] = False
            room[step] -= lengths[sample]
    return step_of_sample


@compiled
def next_that_fits(lengths: Any, ahead: Any, waiting: Any, room: int) -> int:
    """The first of the samples ahead if it fits, else the longest of them that waits and fits; -1 if none does."""
    best = -1
    for sample in ahead:
        if waiting[sample] and lengths[sample] <= room and (best < 0 or lengths[sample] > lengths[best]):
            best = sample
            if sample == ahead[0]:
                break
    return best


@compiled
def fit(lengths: Any, capacity: int, bins: int, bin_of_sample: Any) -> bool:
    """Assign samples to bins by LPT, and by exchanges where a bin overflows; returns whether all fit."""
    heap = np.empty(bins, np.int64)
    order = np.argsort(-lengths, kind="mergesort")
    if longest_first(lengths, order, len(lengths), capacity, bins, heap, bin_of_sample):
        return True
    if lengths.sum() > bins * capacity:
        return False
    # No bin holds more: before its last sample it was the least filled.
    longest_first(lengths, order, len(lengths), 2 * capacity, bins, heap, bin_of_sample)
    balance(lengths, lengths, capacity, bins, bin_of_sample)
    tokens = np.zeros(bins, np.int64)
    for sample in range(len(lengths)):
        tokens[bin_of_sample[sample]] += lengths[sample]
    return bool(tokens.max() <= capacity)


@compiled
def balance_steps(lengths: Any, work: Any, capacity: int, bins: int, step_starts: Any, bin_of_sample: Any) -> None:
    """Even out the work of the bins of each step; then number the bins of a step by falling work.

    Args:
        lengths: [N]
        work: [N]; of each sample.
        capacity: tokens of a bin.
        bins: bins of a step.
        step_starts: [steps + 1]
        bin_of_sample: [N]; changed in place.
    """
    for step in range(len(step_starts) - 1):
        run = slice(step_starts[step], step_starts[step + 1])
        balance(lengths[run], work[run], capacity, bins, bin_of_sample[run])


@compiled
def balance(lengths: Any, work: Any, capacity: int, bins: int, bin_of_sample: Any) -> None:
    """One step of ``balance_steps``.

    The bin with the most work gives a sample to another bin and takes none, one or two for it, whichever brings the
    two closest together, as long as the tokens of both stay within half a per cent of the mean (or within what LPT
    left, where that is wider) and within the capacity. It ends once the bin with the most work finds no exchange.
    """
    tokens, load = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    for sample in range(len(lengths)):
        tokens[bin_of_sample[sample]] += lengths[sample]
        load[bin_of_sample[sample]] += work[sample]
    total = load.sum()
    mean = tokens.sum() // bins
    most = min(capacity, max(tokens.max(), mean + mean // 200))
    least = min(tokens.min(), mean - mean // 200)
    given, taken = np.empty(_MOST_GIVEN, np.int64), np.empty(_MOST_TAKEN, np.int64)
    # Every exchange lowers the most work or the number of bins that have it; the bound is for the clock.
    for _ in range(16 * bins):
        giver = int(np.argmax(load))
        if (load[giver] * bins - total) * _CLOSE_ENOUGH <= total:
            break
        num_given = heaviest(work, bin_of_sample, giver, given)
        exchanged = False
        for taker in np.argsort(load, kind="mergesort")[:_MOST_TAKERS]:
            if load[taker] >= load[giver]:
                break
            num_taken = spread_out(lengths, bin_of_sample, taker, taken)
            # Tokens that the taker may gain, and must.
            gain = min(most - tokens[taker], tokens[giver] - least)
            lose = max(least - tokens[taker], tokens[giver] - most)
            i, j, k = best_exchange(
                lengths, work, given[:num_given], taken[:num_taken], lose, gain, load[giver] - load[taker]
            )
            if i < 0:
                continue
            for sample, source, target in ((i, giver, taker), (j, taker, giver), (k, taker, giver)):
                if sample >= 0:
                    bin_of_sample[sample] = target
                    tokens[source] -= lengths[sample]
                    tokens[target] += lengths[sample]
                    load[source] -= work[sample]
                    load[target] += work[sample]
            exchanged = True
            break
        if not exchanged:
            break
    number_of = np.empty(bins, np.int64)
    for number, b in enumerate(np.argsort(-load, kind="mergesort")):
        number_of[b] = number
    for sample in range(len(lengths)):
        bin_of_sample[sample] = number_of[bin_of_sample[sample]]


@compiled
def best_exchange(lengths: Any, work: Any, given: Any, taken: Any, lose: int, gain: int, gap: int) -> Any:
    """The sample i to give, and j and k to take for it (-1: none), that bring the work of two bins closest together.

    The taker gains lengths[i] - lengths[j] - lengths[k] tokens, from ``lose`` to ``gain``, and as much work, more than
    none and less than the ``gap`` between the two; i is -1 if there is no such exchange.
    """
    best, best_i, best_j, best_k = gap, -1, -1, -1
    for i in given:
        if lose <= lengths[i] <= gain and abs(gap - 2 * work[i]) < best:
            best, best_i, best_j, best_k = abs(gap - 2 * work[i]), i, -1, -1
        for first in range(len(taken)):
            j = taken[first]
            tokens, moved = lengths[i] - lengths[j], work[i] - work[j]
            if tokens < lose or moved <= 0:
                continue
            if tokens <= gain and abs(gap - 2 * moved) < best:
                best, best_i, best_j, best_k = abs(gap - 2 * moved), i, j, -1
            for second in range(first):
                k = taken[second]
                if lose <= tokens - lengths[k] <= gain and abs(gap - 2 * (moved - work[k])) < best:
                    best, best_i, best_j, best_k = abs(gap - 2 * (moved - work[k])), i, j, k
    return best_i, best_j, best_k


@compiled
def heaviest(work: Any, bin_of_sample: Any, b: int, chosen: Any) -> int:
    """Fill ``chosen`` with the samples of a bin that have the most work, and return how many there are."""
    members = np.flatnonzero(bin_of_sample == b)
    order = np.argsort(-work[members], kind="mergesort")
    count = min(len(members), len(chosen))
    for at in range(count):
        chosen[at] = members[order[at]]
    return count


@compiled
def spread_out(lengths: Any, bin_of_sample: Any, b: int, chosen: Any) -> int:
    """Fill ``chosen`` with samples of a bin, evenly from the longest to the shortest; return how many there are."""
    members = np.flatnonzero(bin_of_sample == b)
    order = np.argsort(-lengths[members], kind="mergesort")
    count = min(len(members), len(chosen))
    for at in range(count):
        chosen[at] = members[order[at * len(members) // count]]
    return count
