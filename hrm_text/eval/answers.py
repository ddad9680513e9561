"""What a run needs of a model: text in, text out, many at once. It never learns what answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Finish = Literal["stop", "length", "no room"]
"""stop: the response ended. length: it was cut, by ``max_new_tokens`` or the context. no room: the prompt alone fills
the context, so that nothing was asked."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One response to be made."""

    condition: str
    """Tags such as ``synth,cot``."""
    prompt: str
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One response."""

    text: str
    """Special tokens left out."""
    num_tokens: int
    """Of the response; its end token counts."""
    finish_reason: Finish


class Answerer(Protocol):
    """What answers: an engine, or a table in a test."""

    @property
    def context(self) -> int:
        """Tokens of prompt and response that there is room for."""
        ...

    def num_tokens(self, condition: str, prompt: str) -> int:
        """Tokens of a prompt with its condition, as the model sees it.

        Raises:
            UserError: a condition that the model's tokenizer does not know.
        """
        ...

    def ask(self, asked: Sequence[Asked], told: Callable[[int, Answer], None]) -> None:
        """Answer all, in whichever order is fastest; ``told(index, answer)`` is called once for each, as they end.

        The answer to a request does not depend on what is asked beside it.
        """
        ...

    def speed(self) -> Mapping[str, float]:
        """Figures of the asking so far, such as tokens per second: of the clock, so never the same twice."""
        ...
