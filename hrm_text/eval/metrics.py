"""Measures of an evaluation: what counts as right, and how sure a share of right answers is."""

from __future__ import annotations

import math
import unicodedata


def exact_match(response: str, answer: str) -> bool:
    """Whether the two texts are the same, white space around them aside.

    Both are compared in Unicode's composed form (NFC): the tokenizer normalises to it, so a model can give no other.
    """
    return unicodedata.normalize("NFC", response.strip()) == unicodedata.normalize("NFC", answer.strip())


def wilson_interval(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of the true accuracy given ``correct`` of ``n``: the score interval of Wilson (1927); z 1.96 is 95 %.

    Unlike the interval of the normal approximation it stays within 0 and 1 and has a width at 0 % and 100 %, where
    small tasks end up. Without any item nothing is known: (0, 1). Answers that are partly right add up to a ``correct``
    that is no whole number: no scores within 0 and 1 spread more than those of 0 and 1 with their mean, so that the
    interval is then rather too wide.
    """
    assert 0 <= correct <= n, (correct, n)
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and n the formula gives exactly 0 and 1 but for rounding.
    low = 0.0 if correct == 0 else centre - half_width
    high = 1.0 if correct == n else centre + half_width
    return low, high
