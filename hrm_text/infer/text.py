"""One response in the making: what the engine knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from hrm_text.infer.cache import Remembered
from hrm_text.infer.lane import Lane
from hrm_text.infer.prefill import NewTokens
from hrm_text.infer.requests import Cycles, FinishReason, Request, Turn
from hrm_text.infer.sampling import RowState
from hrm_text.infer.text_stream import TextStream


@dataclass(eq=False)
class Text:
    """A request with its tokens so far, its pages and its row."""

    number: int
    request: Request
    cycles: Cycles
    most_tokens: int
    """New tokens at which it ends: as asked, or what the context has room for."""
    state: RowState
    stream: TextStream
    made: list[int] = field(default_factory=list)
    """New tokens that the host has seen, the end token left out."""
    launched: int = 0
    """New tokens that the device has chosen, or is about to."""
    length: int = 0
    """Tokens whose keys and values are in the cache, or about to be."""
    pages: list[int] = field(default_factory=list)
    lane: Lane | None = None
    row: int = -1
    cached: int = 0
    """Tokens of the prompt that were in the cache when it came."""
    num_tokens: int = 0
    """New tokens in all, the end token too."""
    finish_reason: FinishReason | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The exchanges, the last with the response so far."""
        *before, last = self.request.turns
        return (*before, Turn(last.prefix_ids, (*last.response_ids, *self.made)))

    @property
    def total(self) -> int:
        """Tokens so far, as the host knows them."""
        return self.request.num_prompt_tokens + len(self.made)

    def ids(self) -> list[int]:
        """All tokens so far."""
        return [token for turn in self.turns for token in (*turn.prefix_ids, *turn.response_ids)]

    def new_tokens(self, past: int, prefix_lm: bool) -> NewTokens:
        """What is to be computed, the first ``past`` tokens being in the cache; causal, or PrefixLM."""
        starts = accumulate((turn.num_tokens for turn in self.request.turns), initial=0)
        blocks = [
            (start, start + len(turn.prefix_ids)) for start, turn in zip(starts, self.request.turns, strict=False)
        ]
        return NewTokens(self.ids()[past:], past, blocks if prefix_lm else [], self.pages)

    def remembered(self, page_size: int) -> Remembered | None:
        """What the cache has of it, for texts to come; None if not even its prompt."""
        *before, last = self.turns
        context = (self.cycles, tuple(before), last.prefix_ids)
        context_length = sum(turn.num_tokens for turn in before) + len(last.prefix_ids)
        length = min(self.length, self.total)
        if length < context_length:
            return None
        pages: Sequence[int] = self.pages[: -(-length // page_size)]
        return Remembered(context, last.response_ids[: length - context_length], list(pages))
