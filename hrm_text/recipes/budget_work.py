"""What one forward pass is given: tokens, supervised positions, and the pairs of positions that attention looks at."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hrm_text.data.pack import read_epoch
from hrm_text.data.packing_plan import attention_work
from hrm_text.data.storage import Location
from hrm_text.recipes.bench_train import BenchConfig, spans_of, typical_seeds

Lengths = npt.NDArray[np.int64]

MOST_SAMPLES = 200_000
"""Samples of a data set that are looked at."""

FILLED = 0.99
"""Share of a budget of tokens that the packer fills."""


@dataclass(frozen=True)
class Work:
    """Of one forward pass; means over batches, so numbers need not be whole."""

    tokens: float
    """That belong to samples."""
    supervised: float
    pairs: float
    """(query, key) pairs that the mask lets through, of one head."""
    forward_tiles: float
    """Pairs in the tiles of attention's forward kernel, masked ones too; of one head."""
    key_tiles: float
    """The same of the backward kernel over keys."""
    query_tiles: float
    """The same of the backward kernel over queries."""
    block_tiles: float
    """The same in blocks of 128 x 128, which FlexAttention leaves out whole or not at all."""

    @classmethod
    def of(cls, lengths: Lengths, prefixes: Lengths, supervised: float) -> Work:
        """Of these samples: input tokens [N] and how many of them lead as a prefix [N]."""
        return cls(
            tokens=float(lengths.sum()),
            supervised=float(supervised),
            pairs=float(attention_work(lengths, prefixes).sum()),
            forward_tiles=tile_pairs(lengths, prefixes, 64, 32),
            key_tiles=tile_pairs(lengths, prefixes, 64, 64, keys=True),
            query_tiles=tile_pairs(lengths, prefixes, 64, 64),
            block_tiles=tile_pairs(lengths, prefixes, 128, 128),
        )

    def times(self, factor: float) -> Work:
        """So many times the work."""
        return Work(*(factor * value for value in dataclasses.astuple(self)))


def tile_pairs(lengths: Lengths, prefixes: Lengths, own: int, other: int, *, keys: bool = False) -> float:
    """Pairs in all tiles of ``own`` rows, each of which walks over whole tiles of ``other`` (``kernels.tiles``)."""
    counts = -(-lengths // own)
    sample = np.repeat(np.arange(len(counts)), counts)
    first = (np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)) * own
    length, prefix = lengths[sample], prefixes[sample]
    if keys:
        walked = length - np.where(first < prefix, 0, first)
    else:
        walked = np.minimum(length, np.maximum(prefix, first + own))
    return float((own * other * -(-walked // other)).sum())


@functools.cache
def synthetic_work(distribution: str, tokens: int) -> Work:
    """Of a budget of tokens by a distribution of ``synthetic``: the mean of the batches that ``bench train`` takes."""
    config = BenchConfig(tokens=tokens, distribution=distribution)
    batches = []
    for seed in typical_seeds(config):
        spans = spans_of(config, seed)
        lengths, prefixes = spans.lengths.numpy().astype(np.int64), spans.prefix_lengths.numpy().astype(np.int64)
        # The last token of a prefix predicts the first of its response.
        batches.append(Work.of(lengths, prefixes, (lengths - np.maximum(prefixes - 1, 0)).sum()))
    return Work(*np.mean([dataclasses.astuple(batch) for batch in batches], 0).tolist())


@dataclass(frozen=True)
class DataWork:
    """What a sampled folder holds."""

    tokens: float
    """Input tokens of all its epochs, or of those that the run takes."""
    per_token: Work
    """Means over a spread of its samples, for one token."""


def data_work(sampled: Location, epochs: list[int], causal: bool, all_supervised: bool) -> DataWork:
    """Of some epochs of a sampled folder; each is read at MOST_SAMPLES places at most."""
    tokens, parts = 0.0, []
    for epoch in epochs:
        index = read_epoch(sampled, epoch)
        few = index[slice(0, None, max(1, len(index) // MOST_SAMPLES))]
        lengths = few.sample_lengths
        prefixes = np.zeros_like(lengths) if causal else few.inst_len
        supervised = lengths - 1 if all_supervised else few.resp_len
        part = Work.of(lengths, np.asarray(prefixes, np.int64), float(supervised.sum())).times(len(index) / len(few))
        tokens += part.tokens
        parts.append(part)
    total = Work(*np.sum([dataclasses.astuple(part) for part in parts], 0).tolist())
    return DataWork(tokens, total.times(1 / tokens))
