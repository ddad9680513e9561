"""A draft head and the acceptance of its guesses as a handful of kernels: nothing waits for the host.

The definition of the head is ``draft.DraftHead``; that of acceptance is ``accept_plain``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm_text.model.block import rms_norm
from hrm_text.model.draft import DraftHead
from hrm_text.model.kernels.decode import Arrivals, Vector, Weight, multiply
from hrm_text.model.recurrence import RecurrentLM

# R rows of a text (its newest token and the guesses behind it), D width, V vocabulary


@dataclass(frozen=True)
class Progress:
    """Where a text is, on the device; every pass changes it in place."""

    ids_R: Tensor
    """LongTensor: the newest token and the guesses."""
    positions_R: Tensor
    """LongTensor: the number of tokens in the cache, and on from there."""
    answer: Tensor
    """LongTensor: all tokens chosen so far, and room for R more behind them."""
    news: Tensor
    """IntTensor [2]: how many they are; how many up to the end token, itself included, or 0."""
    accepted_R: Tensor
    """IntTensor: how often so many guesses were right."""


@triton.jit
def _accept(
    chosen, hidden, ids, positions, answer, news, accepted, state, end,
    R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program. state [D] becomes the row of ``hidden`` [R, D] that chose the newest token."""
    right = 0
    alive = 1
    for i in tl.static_range(R - 1):
        alive = alive * (tl.load(chosen + i) == tl.load(ids + i + 1)).to(tl.int32)
        right += alive
    count = tl.load(news)
    ended = tl.load(news + 1)
    for i in tl.static_range(R):
        token = tl.load(chosen + i)
        tl.store(answer + count + i, token)  # what is beyond the right ones will be written over
        ended = tl.where((i <= right) & (ended == 0) & (token == end), count + i + 1, ended)
    newest = tl.load(chosen + right)
    first = tl.load(positions) + right + 1
    times = tl.load(accepted + right) + 1
    d = tl.arange(0, BLOCK_D)
    state_D = tl.load(hidden + right * D + d, mask=d < D, other=0.0)
    tl.debug_barrier()  # every thread has read what is written now
    tl.store(news, count + right + 1)
    tl.store(news + 1, ended)
    tl.store(accepted + right, times)
    tl.store(state + d, state_D, mask=d < D)
    tl.store(ids, newest)
    for i in tl.static_range(R):
        tl.store(positions + i, first + i)


def accept(chosen_R: Tensor, hidden_RD: Tensor, progress: Progress, state_1D: Tensor, end: int) -> None:
    """The longest run of right guesses and one token more are the text's; state is what chose the last of them."""
    width = hidden_RD.shape[1]
    assert chosen_R.is_contiguous() and hidden_RD.is_contiguous()
    _accept[(1,)](
        chosen_R, hidden_RD, progress.ids_R, progress.positions_R, progress.answer, progress.news, progress.accepted_R,
        state_1D, end, R=len(chosen_R), D=width, BLOCK_D=triton.next_power_of_2(width),
    )  # fmt: skip


def accept_plain(chosen_R: Tensor, hidden_RD: Tensor, progress: Progress, state_1D: Tensor, end: int) -> None:
    """The definition of ``accept``."""
    rows = len(chosen_R)
    right = int((chosen_R[:-1] == progress.ids_R[1:]).long().cumprod(0).sum())
    count, ended = progress.news.tolist()
    progress.answer[count : count + rows] = chosen_R
    here = (chosen_R[: right + 1] == end).nonzero()
    if not ended and len(here):
        progress.news[1] = count + int(here[0]) + 1
    progress.news[0] = count + right + 1
    progress.accepted_R[right] += 1
    state_1D[0] = hidden_RD[right]
    progress.ids_R[0] = chosen_R[right]
    progress.positions_R.add_(right + 1)


class DraftStep:
    """A head as four products and two look-ups a guess, for one text.

    The embedding's half of the first product is made once for the whole vocabulary: V x D numbers.
    """

    def __init__(self, model: RecurrentLM, head: DraftHead) -> None:
        embedding_VD, width = model.model.embed_tokens.weight.detach(), model.config.hidden_size
        self.eps = head.eps
        of_state, of_embedding = head.enter.weight.detach().split(width, dim=1)
        self.table_VD = torch.nn.functional.linear(rms_norm(embedding_VD, head.eps), of_embedding)
        self.enter = Weight(of_state.contiguous(), None)
        self.gate_up = Weight(head.mlp.gate_up_proj.weight.detach(), None)
        self.down = Weight(head.mlp.down_proj.weight.detach(), None)
        self.lm_head = Weight(model.lm_head.weight.detach(), None)
        self.h_1I = embedding_VD.new_empty(1, self.down.matrix.shape[1])
        self.logits_1V = embedding_VD.new_empty(1, len(embedding_VD))

    def __call__(self, state_1D: Tensor, id_1: Tensor) -> tuple[Tensor, Tensor]:
        """(the next state, not normed yet; the guess [1]) behind a token."""
        none = Arrivals(self.h_1I, self.h_1I)
        small, wide = Vector(4, 512, 2, 2), Vector(16, 512, 1, 4)
        x_1D = self.table_VD[id_1]
        multiply(state_1D, self.enter, x_1D, small, none, eps=self.eps, residual=True)
        multiply(x_1D, self.gate_up, self.h_1I, small, none, eps=self.eps, pair=True)
        multiply(self.h_1I, self.down, x_1D, small, none, residual=True)
        multiply(x_1D, self.lm_head, self.logits_1V, wide, none, eps=self.eps)
        return x_1D, self.logits_1V.argmax(-1)
