"""Packed batches whose lengths are drawn from a distribution, for measurements that need no data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hrm_text.contracts import UserError
from hrm_text.model.attention import Spans

CONTEXT = 4096
"""Tokens of the longest sample, as in the released models."""

FULL = 0.98
"""A batch is full when so much of it is."""

PATIENCE = 256
"""Draws in a row that do not fit before a batch is taken as it is."""

Draw = Callable[[np.random.Generator], tuple[int, int]]
"""One sample's (tokens of the prefix, tokens of the response)."""


def anchor(rng: np.random.Generator) -> tuple[int, int]:
    """The lengths with which the published trainer was measured: mostly a few hundred tokens, with a long tail."""
    prefix = int(np.clip(rng.lognormal(4.6, 1.0), 8, 3000))
    return prefix, int(np.clip(rng.lognormal(4.8, 1.2), 1, CONTEXT - prefix))


def causal(rng: np.random.Generator) -> tuple[int, int]:
    """The same samples without a prefix."""
    return 0, sum(anchor(rng))


def short(rng: np.random.Generator) -> tuple[int, int]:
    """About 100 tokens each, half of them prefix: shorter than a tile of most kernels."""
    return int(rng.integers(40, 61)), int(rng.integers(40, 61))


def mixed(rng: np.random.Generator) -> tuple[int, int]:
    """One sample in sixteen is 1,024 to 2,048 tokens, which is about half of the tokens; the others are short."""
    if rng.random() < 1 / 16:
        return int(rng.integers(256, 513)), int(rng.integers(768, 1537))
    return short(rng)


def long(rng: np.random.Generator) -> tuple[int, int]:
    """Samples of the whole context, a quarter of it prefix."""
    return CONTEXT // 4, CONTEXT - CONTEXT // 4


DISTRIBUTIONS: dict[str, Draw] = {"anchor": anchor, "short": short, "mixed": mixed, "long": long, "causal": causal}


def synthetic_spans(distribution: str, num_tokens: int, seed: int) -> Spans:
    """Samples of a distribution laid end to end, until a batch of ``num_tokens`` is full.

    Samples that do not fit are drawn again; a batch into which none fits has one that fills it, prefix in proportion.

    Raises:
        UserError: there is no such distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"unknown distribution {distribution!r}; choose from {', '.join(DISTRIBUTIONS)}")
    draw, rng = DISTRIBUTIONS[distribution], np.random.Generator(np.random.Philox(seed=seed))
    samples: list[tuple[int, int]] = []
    free, missed = num_tokens, 0
    prefix = response = 1
    while free > (1 - FULL) * num_tokens and missed < PATIENCE:
        prefix, response = draw(rng)
        if prefix + response > free:
            missed += 1
            continue
        samples.append((prefix, response))
        free, missed = free - prefix - response, 0
    if not samples:
        prefix = num_tokens * prefix // (prefix + response)
        samples.append((prefix, num_tokens - prefix))
    prefixes, responses = torch.tensor(samples).unbind(1)
    return Spans.of_samples(prefixes + responses, prefixes)
