"""How well a tokenizer suits a corpus: bytes per token, by source, beside public tokenizers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hrm_text.contracts import UserError
from hrm_text.data.corpus_stats import dataset_of
from hrm_text.data.records import BadRecord, RecordFile
from hrm_text.data.text_sample import sample_texts
from hrm_text.data.tokenizer import cut, load_tokenizer

SOURCE_BYTES = 1 << 20
PUBLIC = ("cl100k_base", "o200k_base")
"""GPT-4's and GPT-4o's, of 100,277 and 200,019 entries; the package bpe-openai carries both in itself."""
OURS = "this one"

CountTokens = Callable[[str], int]


@dataclass(slots=True)
class SourceQuality:
    """A sample of one source."""

    source: str
    texts: int = 0
    bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """By tokenizer; control tokens not counted."""

    def bytes_per_token(self, name: str) -> float:
        return self.bytes / max(self.tokens[name], 1)


def public_tokenizer(name: str) -> CountTokens | None:
    """What counts the tokens of a text under a public tokenizer; None if the package that carries it is missing.

    Raises:
        UserError: there is no such tokenizer.
    """
    if name not in PUBLIC:
        raise UserError(f"unknown public tokenizer {name!r}; expected one of {', '.join(PUBLIC)}")
    if importlib.util.find_spec("bpe_openai") is None:
        return None
    encoding = importlib.import_module("bpe_openai").get_encoding(name)
    return lambda text: len(encoding.encode_ordinary(text))


def tokenizer_quality(
    tokenizer_dir: Path,
    files: Sequence[RecordFile],
    against: dict[str, CountTokens],
    on_bad: Callable[[BadRecord], None],
    *,
    source_bytes: int = SOURCE_BYTES,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[SourceQuality]:
    """Count the tokens of a sample of every source, and of all of them together, last.

    Args:
        tokenizer_dir: a tokenizer folder.
        files: a source is the files whose names share what stands before ``__``.
        against: other tokenizers by name.
        on_bad: is told of bad records in the sample.
        source_bytes: of each source's sample.
        seed: of the samples.
        on_progress: sources done, and in all.

    Raises:
        UserError: no tokenizer, or a damaged file.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    counters: dict[str, CountTokens] = {
        OURS: lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
        **against,
    }
    by_source: dict[str, list[RecordFile]] = {}
    for file in files:
        by_source.setdefault(dataset_of(file.safe_name), []).append(file)
    total = SourceQuality("all of these", tokens=dict.fromkeys(counters, 0))
    found = []
    for source, of_source in sorted(by_source.items()):
        quality = SourceQuality(source, tokens=dict.fromkeys(counters, 0))
        for text in sample_texts(of_source, source_bytes, seed, on_bad):
            for piece in cut(text):
                for name, count in counters.items():
                    quality.tokens[name] += count(piece)
            quality.texts += 1
            quality.bytes += len(text.encode("utf-8", "surrogatepass"))
        total.texts += quality.texts
        total.bytes += quality.bytes
        for name in counters:
            total.tokens[name] += quality.tokens[name]
        found.append(quality)
        if on_progress is not None:
            on_progress(len(found), len(by_source))
    return [*found, total]
