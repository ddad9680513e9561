"""What the rooms hand to each other: plain data, the standard library and NumPy alone.

Everything here may be imported by every room; nothing here imports a room.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""

CONDITIONS = ("direct", "cot", "noisy", "synth")
"""The condition tags. A condition is one or more of them, comma-separated, in the order they are emitted."""


class UserError(ValueError):
    """Something the user can mend: the message says what was found, what was expected and what to do.

    The command line prints the message alone; any other exception is a bug of ours and keeps its traceback.
    """


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """A question for an error message, with a space behind it, where a known name is close to what was found; or ""."""
    close = difflib.get_close_matches(found, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


@dataclass(frozen=True, slots=True)
class Example:
    """One training record: the text of an instruction, of its response, and the tags that condition the response."""

    condition: str
    instruction: str
    response: str


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Whole samples laid end to end: the token budget of one forward pass on one rank.

    T tokens hold S samples. Positions from ``sample_starts[-1]`` on are padding: they belong to no sample.
    """

    input_ids: npt.NDArray[np.int64]
    """[T]"""
    labels: npt.NDArray[np.int64]
    """[T]; the id that follows each position, IGNORE_INDEX where it is not supervised."""
    position_ids: npt.NDArray[np.int64]
    """[T]; 0, 1, 2, ... restarting in every sample."""
    sample_starts: npt.NDArray[np.int64]
    """[S + 1]; sample s is the tokens sample_starts[s] to sample_starts[s + 1]."""
    prefix_lengths: npt.NDArray[np.int64]
    """[S]; how many leading tokens of a sample see each other in both directions; 0 is purely causal."""

    @property
    def num_samples(self) -> int:
        return len(self.prefix_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to a sample; the padded tail does not count."""
        return int(self.sample_starts[-1])

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


@runtime_checkable
class Engine(Protocol):
    """What evaluation and serving need of a model: text in, text out."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        condition: str = "direct",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """The response to each prompt, special tokens left out. Temperature 0 is greedy."""
        ...
