"""A draft head and the acceptance of its guesses as a handful of kernels: nothing waits for the host.

The definitions are ``draft.DraftHead`` and ``draft.accept``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm_text.model.block import rms_norm
from hrm_text.model.draft import DraftHead
from hrm_text.model.kernels.decode import Arrivals, Vector, Weight, multiply
from hrm_text.model.recurrence import RecurrentLM

# R rows of a text (its newest token and the guesses behind it), D width, V vocabulary


@triton.jit
def _accept(
    chosen, ids, hidden, newest, length, state, told, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One program."""
    right = 0
    alive = 1
    for i in tl.static_range(R - 1):
        alive = alive * (tl.load(chosen + i) == tl.load(ids + i + 1)).to(tl.int32)
        right += alive
    for i in tl.static_range(R):
        tl.store(told + i, tl.load(chosen + i))
    tl.store(told + R, right + 1)
    newest_id = tl.load(chosen + right)
    new_length = tl.load(length) + right + 1
    d = tl.arange(0, BLOCK_D)
    state_D = tl.load(hidden + right * D + d, mask=d < D, other=0.0)
    tl.debug_barrier()  # every thread has read what is written now
    tl.store(newest, newest_id)
    tl.store(length, new_length)
    tl.store(state + d, state_D, mask=d < D)


def accept(
    chosen_R: Tensor, ids_R: Tensor, hidden_RD: Tensor, newest_1: Tensor, length_1: Tensor, state_1D: Tensor
) -> Tensor:
    """``draft.accept`` in one kernel, and the host does not learn how many were right."""
    rows, width = hidden_RD.shape
    assert all(x.is_contiguous() for x in (chosen_R, ids_R, hidden_RD, state_1D))
    told = chosen_R.new_empty(rows + 1)
    _accept[(1,)](
        chosen_R, ids_R, hidden_RD, newest_1, length_1, state_1D, told,
        R=rows, D=width, BLOCK_D=triton.next_power_of_2(width),
    )  # fmt: skip
    return told


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
