"""What the engine needs of a model, and of the format of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hrm_text.model.config import ModelConfig
from hrm_text.model.recurrence import RecurrentLM


class TextFormat(Protocol):
    """What the engine needs of a prompt format: when a response ends, and what its tokens say."""

    @property
    def eoa_id(self) -> int:
        """The end token."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of a response's tokens."""
        ...


class Answering(Protocol):
    """What the engine needs of a model."""

    @property
    def module(self) -> RecurrentLM:
        """Its weights."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""
        ...

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer: those of the model beyond are never chosen."""
        ...

    @property
    def prompt_format(self) -> TextFormat:
        """Its tokens."""
        ...
