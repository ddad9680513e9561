"""The tiles of work of a packed batch: every one lies inside one sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hrm_text.model.attention import Spans
from hrm_text.model.kernels.transfer import to_device


class PackedTiles:
    """Where the samples of a packed batch lie, as the kernels read it: lists of tiles, made on the host."""

    def __init__(self, spans: Spans, num_tokens: int, device: torch.device) -> None:
        self.num_tokens, self.device = num_tokens, device
        self.filled = int(spans.starts[-1])
        """Tokens that belong to samples; those behind them are padding."""
        self._starts = spans.starts[:-1].numpy().astype(np.int64)
        self._lengths = spans.lengths.numpy().astype(np.int64)
        self._prefixes = spans.prefix_lengths.numpy().astype(np.int64)
        self._lists: dict[tuple[int, bool], Tensor] = {}

    def of(self, size: int, *, keys: bool) -> Tensor:
        """IntTensor [tiles, 4]: sample start, length, prefix, first row of the tile; most work first."""
        if (size, keys) not in self._lists:
            (self._lists[size, keys],) = to_device([self._make(size, keys)], self.device)
        return self._lists[size, keys]

    def _make(self, size: int, keys: bool) -> Tensor:
        counts = -(-self._lengths // size)
        sample = np.repeat(np.arange(len(counts)), counts)
        first = (np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
        length, prefix = self._lengths[sample], self._prefixes[sample]
        if keys:  # the queries that see the first key of the tile or a later one
            work = length - np.where(first < prefix, 0, first)
        else:
            work = np.minimum(length, np.maximum(prefix, first + size))
        order = np.argsort(-work, kind="stable")
        return torch.from_numpy(np.stack([self._starts[sample], length, prefix, first], 1)[order].astype(np.int32))
