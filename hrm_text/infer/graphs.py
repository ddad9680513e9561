"""Steps on a GPU: fused kernels, recorded once per batch size and replayed, so that launches cost the host nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_text.infer.lane import Rows
from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels.decode import DecodeStep
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.recurrence import RecurrentLM

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batch sizes that are recorded; a batch takes the next larger one."""


class GraphedStep:
    """A ``Step`` that replays recordings. They are made when a size is first met, and read and write the same rows."""

    def __init__(self, model: RecurrentLM, config: ModelConfig, cache: PagedKeyValues, max_batch: int) -> None:
        self.model, self.config, self.cache = model, config, cache
        self.sizes = (*(size for size in SIZES if size < max_batch), max_batch)
        self.decode = DecodeStep(model, max_batch)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._rows: Rows | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, rows: Rows, taken: int, longest: int) -> Tensor:
        """See ``Step``; always of the same rows."""
        assert self._rows is None or self._rows is rows
        self._rows = rows
        size = next(size for size in self.sizes if size >= taken)
        if size not in self._recorded:
            self._recorded[size] = self._record(rows, size)
        graph, logits_BV = self._recorded[size]
        graph.replay()
        return logits_BV[:taken]

    @torch.inference_mode()
    def _record(self, rows: Rows, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # A step twice over changes nothing: the same keys and values go to the same places.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._logits(rows, size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BV = self._logits(rows, size)
        return graph, logits_BV

    def _logits(self, rows: Rows, size: int) -> Tensor:
        hidden_BD = self.decode(rows.ids[:size], rows.lengths[:size], self.cache, rows.table[:size], self.config)
        logits_BV: Tensor = self.model.lm_head(hidden_BD)
        return logits_BV
