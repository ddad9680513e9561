"""Stratified sampling: the epochs that training reads, drawn from a token store ahead of time.

    SAMPLED/tokens.npy                      the tokens of all strata, end to end, in the smallest type that fits
            epoch_<n>/inst_start.npy        int64, as inst_len, resp_start, resp_len: the samples in training order
            metadata.json                   tokenizer_info, vocab_size (null), max_seq_len, total_length
            sampling.json                   seed, rules and counts, for the reader; nothing depends on it

Every source file is a stratum. A stratum is a deck of rows: dealt without replacement, reshuffled when it runs out, and
carried on from one epoch to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from hrm_text.contracts import UserError
from hrm_text.data.pack import EpochIndex, read_integers
from hrm_text.data.tokenize import MANIFEST, SPANS, Progress, store_folders
from hrm_text.files import read_json, whole_folder, write_json
from hrm_text.settings import from_mapping, read_yaml, settings, to_mapping

_COPY_TOKENS = 1 << 22


@settings
class Rule:
    """How much to draw of the source files whose name starts with ``prefix``."""

    prefix: str
    """Start of the folder's name in the store, such as ``flan__``; the empty prefix matches every file."""
    max_per_file: Annotated[int, Field(ge=0)] | None = None
    """Most rows per epoch, before ``repeat``; no limit by default, and 0 leaves the file out."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """How many times the rows go into an epoch."""
    long_context: Literal["truncate", "drop"] = "truncate"
    """A row longer than the context: cut its response, or leave the row out."""


def read_rules(path: Path) -> list[Rule]:
    """The rules of a YAML file, a list of mappings with the keys of ``Rule``.

    Raises:
        UserError: the file is missing, is not such a list, or has an unknown key or a value out of range.
    """
    values = read_yaml(path)
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of rules, each with a prefix, found {type(values).__name__}")
    return [from_mapping(Rule, value, f"{path}: rule {number}") for number, value in enumerate(values, start=1)]


@dataclass(slots=True)
class StratumSummary:
    """What became of one source file."""

    name: str
    rule: str
    """Prefix of the rule that applies."""
    rows: int
    """Rows in the store. Of these are lost:"""
    short_response: int = 0
    """rows whose response has fewer than ``min_resp_len`` tokens, and"""
    too_long: int = 0
    """rows that do not fit the context: the prefix fills it, or the rule drops what would have to be cut."""
    truncated: int = 0
    """Rows in use whose response is cut."""
    usable: int = 0
    """Rows in use."""
    drawn_rows: int = 0
    """Over all epochs, repeats included."""
    drawn_tokens: int = 0
    """Over all epochs, repeats included."""


@dataclass(slots=True)
class SampleSummary:
    """What a sampled folder holds."""

    strata: list[StratumSummary]
    samples_per_epoch: list[int] = field(default_factory=list)
    tokens_per_epoch: list[int] = field(default_factory=list)
    """Prefix and response tokens."""
    unused_rules: list[str] = field(default_factory=list)
    """Prefixes of rules that no file came to: often a misspelt name."""


def sample_epochs(
    store: Path,
    out: Path,
    rules: Sequence[Rule],
    epochs: int,
    seed: int = 0,
    max_seq_len: int = 4097,
    min_resp_len: int = 2,
    *,
    on_progress: Progress | None = None,
) -> SampleSummary:
    """Draw epochs from a token store. The same store, rules and seed give the same bytes.

    Args:
        store: a finished token store; of whichever integer types.
        out: the sampled folder; an older one there is replaced, and is intact until the new one is complete.
        rules: the first whose prefix matches applies; a file that none matches goes in whole, once.
        epochs: how many to draw.
        seed: of the Philox generator.
        max_seq_len: most tokens of prefix and response together: the context plus one.
        min_resp_len: least tokens of a response, end token included. Truncation may go below.
        on_progress: passes over a stratum done, and in all (one to copy its tokens, one for each epoch).

    Raises:
        UserError: no finished store, a damaged one, nothing to draw, or ``out`` holds something else.
    """
    for name, value, least in (
        ("epochs", epochs, 1),
        ("max_seq_len", max_seq_len, 2),
        ("min_resp_len", min_resp_len, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}, expected at least {least}")
    folders = store_folders(store)
    info = _read_manifest(store)
    _refuse_mixed_tokenizers(folders)
    _refuse_other_content(out)

    chosen = [_rule_for(folder.name, rules) for folder in folders]
    summary = SampleSummary(
        strata=[StratumSummary(folder.name, rule.prefix, 0) for folder, rule in zip(folders, chosen, strict=True)],
        unused_rules=[rule.prefix for rule in rules if all(rule is not used for used in chosen)],
    )
    total_passes = len(folders) * (1 + epochs)
    passes = 0

    def advance() -> None:
        nonlocal passes
        passes += 1
        if on_progress is not None:
            on_progress(passes, total_passes)

    rng = np.random.Generator(np.random.Philox(seed=seed))
    decks: list[Deck | None] = [None] * len(folders)
    with whole_folder(out) as beside:
        offsets = _copy_tokens(folders, beside / "tokens.npy", int(info["vocab_size"]), advance)
        for epoch in range(epochs):
            parts = []
            for number, (folder, rule, stratum) in enumerate(zip(folders, chosen, summary.strata, strict=True)):
                # Read again in every epoch: only the order of the rows is kept in between.
                rows = _usable_rows(folder, rule, stratum, max_seq_len, min_resp_len)
                deck = decks[number] = decks[number] or Deck(len(rows), rng)
                most = len(rows) if rule.max_per_file is None else min(rule.max_per_file, len(rows))
                drawn = rows[deck.draw(most * rule.repeat)]
                parts.append(_shifted(drawn, offsets[number]))
                stratum.drawn_rows += len(drawn)
                stratum.drawn_tokens += _tokens(drawn)
                advance()
            index = _concatenated(parts)
            if not len(index):
                raise UserError(f"{store}: no row to draw; {_losses(summary)}")
            index = index[rng.permutation(len(index))]
            (beside / f"epoch_{epoch}").mkdir()
            for name in SPANS:
                np.save(beside / f"epoch_{epoch}" / f"{name}.npy", getattr(index, name))
            summary.samples_per_epoch.append(len(index))
            summary.tokens_per_epoch.append(_tokens(index))
        metadata = {
            "tokenizer_info": info,
            "vocab_size": None,
            "max_seq_len": max_seq_len,
            "total_length": round(sum(summary.tokens_per_epoch) / epochs),
        }
        write_json(beside / "metadata.json", metadata)
        provenance = {"seed": seed, "min_resp_len": min_resp_len, "rules": [to_mapping(rule) for rule in rules]}
        write_json(beside / "sampling.json", provenance | asdict(summary))
    return summary


class Deck:
    """The rows of a stratum in random order: dealt until none is left, then shuffled again."""

    def __init__(self, rows: int, rng: np.random.Generator) -> None:
        """Nothing is shuffled before the first draw."""
        self._rows = rows
        self._rng = rng
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def draw(self, count: int) -> npt.NDArray[np.int64]:
        """The next rows, [count]; a count above the number of rows goes through the deck more than once."""
        assert count == 0 or self._rows > 0
        hands = [np.empty(0, np.int64)]
        while count > 0:
            if not len(self._order):
                self._order = self._rng.permutation(self._rows)
            hands.append(self._order[:count])
            self._order = self._order[count:]
            count -= len(hands[-1])
        return np.concatenate(hands)


def _refuse_other_content(out: Path) -> None:
    """A folder is replaced only where it holds nothing but what is written here."""
    ours = ("tokens.npy", "metadata.json", "sampling.json")
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    others = sorted(name for name in names if name not in ours and not name.startswith("epoch_"))
    if others:
        raise UserError(f"{out}: is not a sampled folder, it holds {others[0]}; remove it or choose another place")


def _rule_for(name: str, rules: Sequence[Rule]) -> Rule:
    return next((rule for rule in rules if name.startswith(rule.prefix)), Rule(prefix=""))


def _usable_rows(folder: Path, rule: Rule, stratum: StratumSummary, max_seq_len: int, min_resp_len: int) -> EpochIndex:
    """The rows of a stratum that fit, their responses cut where the rule says so. Fills in ``stratum``."""
    columns = [read_integers(folder / f"{name}.npy").astype(np.int64) for name in SPANS]
    if len({len(column) for column in columns}) != 1:
        raise UserError(f"{folder}: its index files differ in length; tokenise its source again")
    rows = EpochIndex(*columns)
    num_tokens = len(read_integers(folder / "tokens.npy"))
    for start, length in ((rows.inst_start, rows.inst_len), (rows.resp_start, rows.resp_len)):
        if len(rows) and (start.min() < 0 or length.min() < 0 or (start + length).max() > num_tokens):
            raise UserError(f"{folder}: an index points outside of tokens.npy; tokenise its source again")

    long_enough = rows.resp_len >= min_resp_len
    room = max_seq_len - np.minimum(rows.inst_len, max_seq_len)
    fits = room >= 1 if rule.long_context == "truncate" else rows.resp_len <= room
    kept = long_enough & fits
    resp_len = np.minimum(rows.resp_len, room)
    stratum.rows = len(rows)
    stratum.short_response = int((~long_enough).sum())
    stratum.too_long = int((long_enough & ~fits).sum())
    stratum.truncated = int((kept & (resp_len < rows.resp_len)).sum())
    stratum.usable = int(kept.sum())
    return EpochIndex(rows.inst_start, rows.inst_len, rows.resp_start, resp_len)[np.flatnonzero(kept)]


def _shifted(rows: EpochIndex, offset: int) -> EpochIndex:
    return EpochIndex(rows.inst_start + offset, rows.inst_len, rows.resp_start + offset, rows.resp_len)


def _concatenated(parts: Sequence[EpochIndex]) -> EpochIndex:
    return EpochIndex(*(np.concatenate([getattr(part, name) for part in parts]) for name in SPANS))


def _tokens(rows: EpochIndex) -> int:
    return int(rows.inst_len.sum() + rows.resp_len.sum())


def _losses(summary: SampleSummary) -> str:
    rows = sum(stratum.rows for stratum in summary.strata)
    short = sum(stratum.short_response for stratum in summary.strata)
    too_long = sum(stratum.too_long for stratum in summary.strata)
    return (
        f"of {rows:,} rows, {short:,} have too short a response, {too_long:,} do not fit the context, "
        f"{rows - short - too_long:,} are left, of which the rules take none"
    )


def _copy_tokens(folders: Sequence[Path], path: Path, vocab_size: int, advance: Callable[[], None]) -> list[int]:
    """Lay the tokens of all strata end to end in one .npy file; returns where each stratum starts."""
    sources = [folder / "tokens.npy" for folder in folders]
    lengths = [len(read_integers(source)) for source in sources]
    if not sum(lengths):
        raise UserError(f"{folders[0].parent}: the store holds no token")
    dtype = np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.int32
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(sum(lengths),))
    offsets = [0, *np.cumsum(lengths).tolist()]
    for source, offset in zip(sources, offsets, strict=False):
        stratum = read_integers(source)
        for start in range(0, len(stratum), _COPY_TOKENS):
            piece = stratum[start : start + _COPY_TOKENS]
            if piece.max() >= vocab_size or piece.min() < 0:
                raise UserError(
                    f"{source}: token id {int(piece.max())} is outside the vocabulary of {vocab_size:,}; "
                    "tokenise its source again with the tokenizer of this store"
                )
            tokens[offset + start : offset + start + len(piece)] = piece
        advance()
    tokens.flush()
    return offsets[:-1]


def _read_manifest(store: Path) -> dict[str, Any]:
    """The tokenizer information of a finished store."""
    if not (store / MANIFEST).is_file():
        raise UserError(
            f"{store}: not a finished token store, it has no {MANIFEST}; "
            "write one with `hrm-text data tokenize`, or run that again if it was interrupted"
        )
    info = read_json(store / MANIFEST)
    if not isinstance(info, dict) or not isinstance(info.get("vocab_size"), int):
        raise UserError(f"{store / MANIFEST}: expected an object with a whole number as vocab_size")
    return info


def _refuse_mixed_tokenizers(folders: Sequence[Path]) -> None:
    """Folders copied together from stores of different tokenizers would make nonsense of each other's ids."""
    first: dict[str, Path] = {}
    for folder in folders:
        metadata = read_json(folder / "metadata.json") if (folder / "metadata.json").is_file() else {}
        checksum = metadata.get("tokenizer_sha256")  # a store of the published pipeline has none
        if checksum is not None:
            first.setdefault(checksum, folder)
    if len(first) > 1:
        names = " and ".join(str(folder) for folder in list(first.values())[:2])
        raise UserError(f"{names}: made with different tokenizers; tokenise both with the same one")
