"""`hrm-text data`: from sources to sampled epochs."""

from __future__ import annotations

from collections.abc import Callable

from hrm_text.cli.data import clean, look, quality, sample, tokens

COMMANDS: dict[str, Callable[..., None]] = (
    clean.COMMANDS | tokens.COMMANDS | quality.COMMANDS | sample.COMMANDS | look.COMMANDS
)
