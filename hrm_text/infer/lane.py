"""The rows of a decoding batch: texts that take a step together, by the same plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedDecoding, PagedKeyValues
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM

# B rows, M pages a text at most, V entries of the vocabulary


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the rows of a batch hold, on the device. A row that is not taken holds zeros, so it writes to page 0."""

    ids: Tensor
    """LongTensor [B]: the newest token, which the next step takes in."""
    lengths: Tensor
    """LongTensor [B]: tokens in the cache, and so the place of the newest."""
    table: Tensor
    """IntTensor [B, M]: the pages of each text."""


class Step(Protocol):
    """One more token of every row: stores its keys and values, and says what may follow."""

    def __call__(self, rows: Rows, taken: int, longest: int, /) -> Tensor:
        """Logits [taken, V] of the first ``taken`` rows; the longest has ``longest`` tokens in the cache."""
        ...


class PlainStep:
    """The definition of a step: the model's own forward pass, which meets the cache as its ``Attention``."""

    def __init__(
        self,
        model: RecurrentLM,
        config: ModelConfig,
        cache: PagedKeyValues,
        attention: type[PagedDecoding] = PagedDecoding,
    ) -> None:
        self.model, self.cache, self.attention = model, cache, attention
        self.steps = plan(config)

    @torch.inference_mode()
    def __call__(self, rows: Rows, taken: int, longest: int) -> Tensor:
        """See ``Step``."""
        positions_B = rows.lengths[:taken]
        table_BM = rows.table[:taken, : longest // self.cache.page_size + 1].long()
        attention = self.attention(self.cache, table_BM, positions_B + 1)
        hidden_BD = self.model(rows.ids[:taken], positions_B, attention, steps=self.steps)
        logits_BV: Tensor = self.model.lm_head(hidden_BD)
        return logits_BV


class Lane:
    """Up to ``max_batch`` rows on the device, each with a text's newest token, its length in the cache and its pages.

    The first rows are taken, without a gap. What the rows hold changes on the device alone, in the order of the calls,
    so that a step can be launched before the host has seen what the last one chose.
    """

    def __init__(self, step: Step, max_batch: int, pages_per_text: int, device: torch.device) -> None:
        self.step, self.device = step, device
        self.rows = Rows(
            torch.zeros(max_batch, dtype=torch.long, device=device),
            torch.zeros(max_batch, dtype=torch.long, device=device),
            torch.zeros(max_batch, pages_per_text, dtype=torch.int32, device=device),
        )
        self._lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def join(self, token: Tensor | int, length: int, pages: Sequence[int]) -> int:
        """Take the next row: a text with ``length`` tokens in its pages, ``token`` behind them. The row's number."""
        row = len(self._lengths)
        self._lengths.append(length)
        self.rows.ids[row] = token
        self.rows.lengths[row] = length
        self.give(row, pages)
        return row

    def give(self, row: int, pages: Sequence[int]) -> None:
        """The pages of a row's text, once there are more."""
        self.rows.table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32).to(self.device, non_blocking=True)

    def leave(self, row: int) -> int:
        """Free a row; the number of the one whose text takes its place (itself, if it was the last)."""
        last = len(self._lengths) - 1
        for held in (self.rows.ids, self.rows.lengths, self.rows.table):
            if row != last:
                held[row] = held[last].clone()
            held[last] = 0
        self._lengths[row] = self._lengths[last]
        self._lengths.pop()
        return last

    def logits(self) -> Tensor:
        """Take a step: logits [B, V] of the rows that are taken. ``choose`` must follow."""
        return self.step(self.rows, len(self._lengths), max(self._lengths))

    def choose(self, ids_B: Tensor) -> None:
        """What follows in each row."""
        taken = len(self._lengths)
        self.rows.ids[:taken] = ids_B
        self.rows.lengths[:taken] += 1
        self._lengths = [length + 1 for length in self._lengths]


def with_cycles(config: ModelConfig, h_cycles: int, l_cycles: int) -> ModelConfig:
    """The configuration with another recurrence, and its own number of calls with gradient."""
    return dataclasses.replace(config, H_cycles=h_cycles, L_cycles=l_cycles, bp_steps=0)
