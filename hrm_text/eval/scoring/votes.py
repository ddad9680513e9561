"""Measures of several responses to one question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from hrm_text.eval.task import Scored


def majority_score(samples: Sequence[Scored]) -> float:
    """What the answer that most responses give is worth, strictly; of equally frequent ones the first given counts.

    What cannot be read has no vote. Without any vote it is 0.
    """
    readable = [sample for sample in samples if sample.readable]
    votes = Counter(sample.got for sample in readable)
    return max(readable, key=lambda sample: votes[sample.got]).strict if readable else 0.0


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k of n responses, drawn without repetition, hold a right one, ``right`` of the n being so.

    That is 1 - C(n - right, k) / C(n, k); its expectation over the responses is the chance of a right one in k tries,
    for every n (Chen et al. 2021, equation 1).
    """
    assert 0 <= right <= n and 1 <= k <= n, (n, right, k)
    return 1 - math.comb(n - right, k) / math.comb(n, k)
