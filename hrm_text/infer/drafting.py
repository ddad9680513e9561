"""Greedy decoding of a text that is alone, with guesses: a pass of the model checks several tokens at once.

A pass begins with the guesses: the head makes them from the newest token and from the state that chose it. The newest
token and the guesses are rows of one step; whatever the model itself chooses counts, so the text is what it would be
without, and each guess that agrees has saved a step. Rows on the device stay the truth: an ordinary step may follow
a pass and a pass a step. After a step, the state is an old one: then guesses are wrong once, and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_text.infer.lane import Rows
from hrm_text.infer.requests import Decode
from hrm_text.infer.sampling import argmax
from hrm_text.model.draft import DraftHead, accept
from hrm_text.model.paged import PagedDecoding, PagedKeyValues
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM

# R rows: the newest token and the guesses behind it; M pages of the text, D width, V vocabulary


class Drafting:
    """The definition of passes with guesses: their rows one after the other, each as a step of its own."""

    def __init__(
        self, model: RecurrentLM, head: DraftHead, guesses: int, cache: PagedKeyValues, vocab_size: int
    ) -> None:
        """``vocab_size`` is the tokenizer's: ids beyond it are never chosen. To guess them is only a wrong guess."""
        self.model, self.head, self.guesses, self.cache, self.vocab_size = model, head, guesses, cache, vocab_size
        weight = model.lm_head.weight
        self.state_1D = torch.zeros(1, model.config.hidden_size, dtype=weight.dtype, device=weight.device)
        self.ahead_R = torch.arange(guesses + 1, device=weight.device)
        self.steps = plan(model.config)

    @torch.inference_mode()
    def begin(self, hidden_1D: Tensor) -> None:
        """The final state that chose the newest token: a prompt's."""
        self.state_1D.copy_(hidden_1D)

    @torch.inference_mode()
    def __call__(self, rows: Rows, num_pages: int) -> Tensor:
        """A pass of the first row's text, which has ``num_pages``: always of the same rows, in which it goes on.

        Pages must have room for as many tokens as there are rows. The result is that of ``draft.accept``.
        """
        return self.run(rows, num_pages)

    def run(self, rows: Rows, num_pages: int) -> Tensor:
        """See ``__call__``."""
        ids_R = self.guess(rows.ids[:1])
        hidden_RD = self.states(ids_R, rows.lengths[:1] + self.ahead_R, rows.table[:1, :num_pages])
        chosen_R = argmax(self.model.lm_head(hidden_RD)[:, : self.vocab_size])
        return self.accept(chosen_R, ids_R, hidden_RD, rows)

    def guess(self, newest_1: Tensor) -> Tensor:
        """LongTensor [R]: the newest token and what may follow it."""
        state_1D, ids = self.state_1D, [newest_1]
        for _ in range(self.guesses):
            state_1D = self.head(state_1D, self.model.model.embed_tokens(ids[-1]))
            ids.append(argmax(self.model.lm_head(state_1D)))
        return torch.cat(ids)

    def states(self, ids_R: Tensor, positions_R: Tensor, table_1M: Tensor) -> Tensor:
        """The final state [R, D] of each row, whose keys and values enter the cache."""
        states = []
        for id_1, position_1 in zip(ids_R.split(1), positions_R.split(1), strict=True):
            attention = PagedDecoding(self.cache, table_1M.long(), position_1 + 1)
            states.append(self.model(id_1, position_1, attention, steps=self.steps))
        return torch.cat(states)

    def accept(self, chosen_R: Tensor, ids_R: Tensor, hidden_RD: Tensor, rows: Rows) -> Tensor:
        """Let the rows and the state go on."""
        return accept(chosen_R, ids_R, hidden_RD, rows.ids[:1], rows.lengths[:1], self.state_1D)


def make_drafting(
    model: RecurrentLM, head: DraftHead, guesses: int, cache: PagedKeyValues, vocab_size: int, decode: Decode
) -> Drafting:
    """Passes of a model that has been prepared to decode so."""
    if decode != "fused":
        return Drafting(model, head, guesses, cache, vocab_size)
    from hrm_text.infer.drafting_graphs import GraphedDrafting

    return GraphedDrafting(model, head, guesses, cache, vocab_size)
