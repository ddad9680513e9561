"""Passes with guesses on a GPU: fused kernels, the whole pass recorded once and replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_text.infer.drafting import Drafting
from hrm_text.infer.lane import Rows
from hrm_text.model.draft import DraftHead
from hrm_text.model.kernels.decode import DecodeStep, Settings
from hrm_text.model.kernels.draft import DraftStep, accept
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.recurrence import RecurrentLM

# R rows: the newest token and the guesses behind it; M pages a text at most, D width


class GraphedDrafting(Drafting):
    """A pass is one step of the kernels for all its rows; nothing in it waits for the host."""

    def __init__(
        self,
        model: RecurrentLM,
        head: DraftHead,
        guesses: int,
        cache: PagedKeyValues,
        vocab_size: int,
        settings: Settings | None = None,
    ) -> None:
        """``settings``: of the step, in the place of the tables'."""
        super().__init__(model, head, guesses, cache, vocab_size)
        self.decode = DecodeStep(model, guesses + 1, settings=settings)
        self.draft = DraftStep(model, head)
        self._rows: Rows | None = None
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, rows: Rows, num_pages: int) -> Tensor:
        """See ``Drafting``; what it gives is there until the next pass."""
        assert self._rows is None or self._rows is rows
        self._rows = rows
        most = rows.table.shape[1]  # a recording knows of no text
        if not rows.ids.is_cuda:  # Triton's interpreter
            return self.run(rows, most)
        if self._recorded is None:
            self._recorded = self._record(rows, most)
        graph, told = self._recorded
        graph.replay()
        return told

    def guess(self, newest_1: Tensor) -> Tensor:
        """See ``Drafting``."""
        state_1D, ids = self.state_1D, [newest_1]
        for _ in range(self.guesses):
            state_1D, id_1 = self.draft(state_1D, ids[-1])
            ids.append(id_1)
        return torch.cat(ids)

    def states(self, ids_R: Tensor, positions_R: Tensor, table_1M: Tensor) -> Tensor:
        """See ``Drafting``."""
        rows = self.guesses + 1
        return self.decode(ids_R, positions_R, self.cache, table_1M.repeat(rows, 1), group=rows)

    def accept(self, chosen_R: Tensor, ids_R: Tensor, hidden_RD: Tensor, rows: Rows) -> Tensor:
        """See ``Drafting``."""
        return accept(chosen_R, ids_R, hidden_RD, rows.ids[:1], rows.lengths[:1], self.state_1D)

    def _record(self, rows: Rows, num_pages: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Trying it out goes on in the rows, which must not show.
        changed = (rows.ids, rows.lengths, self.state_1D)
        before = [x.clone() for x in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(rows, num_pages)
        torch.cuda.current_stream().wait_stream(stream)
        for x, value in zip(changed, before, strict=True):
            x.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            told = self.run(rows, num_pages)
        return graph, told
