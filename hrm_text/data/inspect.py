"""A look into a token store or a sampled folder: samples as text, with the special tokens visible."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hrm_text.contracts import UserError
from hrm_text.data.pack import EpochIndex, read_epoch, read_integers
from hrm_text.data.tokenize import MANIFEST, SPANS, store_folders
from hrm_text.data.tokenizer import load_tokenizer
from hrm_text.files import read_json


@dataclass(frozen=True, slots=True)
class SampleText:
    """A sample as it reaches the model."""

    source: str
    """Folder of a store, or the epoch."""
    row: int
    prefix: str
    response: str
    prefix_tokens: int
    response_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.source} row {self.row}\n"
            f"  prefix, {self.prefix_tokens} tokens:   {self.prefix}\n"
            f"  response, {self.response_tokens} tokens: {self.response}"
        )


def inspect_folder(path: Path, limit: int, tokenizer: Path | None = None) -> list[SampleText]:
    """The first samples of a sampled folder's first epoch, or of a token store, as evenly from its files as can be.

    Args:
        path: a sampled folder or a token store.
        limit: most samples.
        tokenizer: the tokenizer folder, where it no longer lies at the place that the folder names.

    Raises:
        UserError: ``path`` is neither, is damaged, or its tokenizer is missing.
    """
    if (path / "metadata.json").is_file() and (path / "tokens.npy").is_file():
        info = read_json(path / "metadata.json").get("tokenizer_info", {})
        decoder = _tokenizer(path, info, tokenizer)
        return _texts("epoch_0", path / "tokens.npy", read_epoch(path, 0), limit, decoder)
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path}: expected a token store (with {MANIFEST}) or a sampled folder (with tokens.npy and metadata.json)"
        )
    decoder = _tokenizer(path, read_json(path / MANIFEST), tokenizer)
    by_file = []
    for folder in islice(store_folders(path), limit):
        rows = EpochIndex(*(read_integers(folder / f"{name}.npy").astype("int64") for name in SPANS))
        by_file.append(_texts(folder.name, folder / "tokens.npy", rows, limit, decoder))
    # The first of every file, then the second of every file, until there are enough.
    in_turn = sorted((text for texts in by_file for text in texts), key=lambda text: text.row)
    return sorted(in_turn[:limit], key=lambda text: text.source)


def _tokenizer(path: Path, info: dict[str, Any], given: Path | None) -> Tokenizer:
    named = info.get("tokenizer_path")
    if given is None and named is None:
        raise UserError(f"{path}: does not say which tokenizer it was made with; name one")
    folder = given or Path(str(named))
    try:
        return load_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{path}: was made with the tokenizer {folder}, which cannot be read: {error}") from None


def _texts(source: str, tokens_file: Path, rows: EpochIndex, limit: int, tokenizer: Tokenizer) -> list[SampleText]:
    tokens = read_integers(tokens_file)

    def text(start: int, length: int) -> str:
        return str(tokenizer.decode(tokens[start : start + length].tolist(), skip_special_tokens=False))

    return [
        SampleText(
            source=source,
            row=row,
            prefix=text(int(rows.inst_start[row]), int(rows.inst_len[row])),
            response=text(int(rows.resp_start[row]), int(rows.resp_len[row])),
            prefix_tokens=int(rows.inst_len[row]),
            response_tokens=int(rows.resp_len[row]),
        )
        for row in range(min(limit, len(rows)))
    ]
