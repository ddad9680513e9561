"""What the engine is asked, and what it says: plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hrm_text.contracts import UserError

KeyValues = Literal["auto", "int8"]
"""What the cache keeps: numbers of the model's dtype, or integers with a scale for each token and head."""

Decode = Literal["auto", "plain", "compiled", "fused"]
"""How steps are computed. plain: the model's own forward pass, the definition. compiled: compiled loops on a CPU.
fused: kernels in a CUDA graph."""

FinishReason = Literal["stop", "length", "cancelled"]
"""stop: the end token, or a stop string. length: max_new_tokens, or the end of the context."""


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. The order: bias, repetition penalty, temperature, top_k, top_p, min_p, draw."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability."""
    seed: int = 0
    """The same request with the same seed gives the same text, whatever runs beside it."""
    top_k: int = 0
    """Keep so many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep the tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, logits of tokens that the prompt or the response has are divided by it (multiplied where negative)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id to what is added to its logit."""
    logprobs: int | None = None
    """Report the log-probability of each token, and of so many of the likeliest; None: nothing is reported."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 (greedy) or positive, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all) or positive, found {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 to 1, found {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty must be positive, found {self.repetition_penalty}")
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise UserError(f"logit_bias must hold finite numbers, found {dict(self.logit_bias)}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs must be from 0 to {MOST_LOGPROBS}, found {self.logprobs}")


MOST_LOGPROBS = 20
"""Alternatives reported beside a token."""


@dataclass(frozen=True)
class Turn:
    """One exchange: ids that see each other both ways, and the response to them as far as it goes."""

    prefix_ids: tuple[int, ...]
    response_ids: tuple[int, ...] = ()
    """With its end token in all turns but the last, where it is what the response is to begin with."""

    @property
    def num_tokens(self) -> int:
        """Tokens of both."""
        return len(self.prefix_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Cycles:
    """How often the recurrence goes round (hrm, trm): the dial of computation per token."""

    h_cycles: int
    l_cycles: int


@dataclass(frozen=True)
class Request:
    """One response to be made."""

    turns: tuple[Turn, ...]
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """The response ends before the first of these texts."""
    cycles: Cycles | None = None
    """None: the engine's own."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not self.turns or not all(turn.prefix_ids for turn in self.turns):
            raise UserError("a request needs at least one turn, and every turn a prompt of at least one token")
        if any(not text for text in self.stop):
            raise UserError("stop must not hold an empty text")

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that are there before the first new one."""
        return sum(turn.num_tokens for turn in self.turns)


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of the response with its log-probability under the model itself: before temperature and cuts."""

    token_id: int
    text: str
    """What the token adds; of a token that ends within a character the mark for that."""
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest tokens at this place: id, text, log-probability, best first."""


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one request: text that is final, whole characters alone; the last piece says why it ended."""

    request: int
    """The number that ``submit`` gave."""
    text: str = ""
    scores: tuple[TokenScore, ...] = ()
    """Of the tokens since the last piece, if they were asked for."""
    num_tokens: int = 0
    """Tokens made for this request so far; the end token counts."""
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were there from an earlier turn."""
