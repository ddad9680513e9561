"""Stratified sampling: the epochs that training reads, drawn from a token store ahead of time.

    SAMPLED/tokens.npy                      the tokens of all strata, end to end, in the smallest type that fits
            token_files.json                in its place, for a virtual folder: where those tokens lie in the store
            epoch_<n>/inst_start.npy        int64, as inst_len, resp_start, resp_len: the samples in training order
            metadata.json                   tokenizer_info, vocab_size (null), max_seq_len, total_length
            sampling.json                   seed, rules and counts, for the reader; nothing depends on it

Every source file is a stratum. A stratum is a deck of rows: dealt without replacement, reshuffled when it runs out, and
carried on from one epoch to the next.

Memory: twelve bytes for each sample of an epoch (where it goes, and one column), and what ``decks`` keeps. Everything
else is read and written in pieces; the rows drawn wait in an unnamed file on the disk of the sampled folder.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from hrm_text.contracts import UserError
from hrm_text.data.decks import Deck, Limits, Stratum, StratumSummary, chunks, permutation, row_type, survey
from hrm_text.data.engine import Progress
from hrm_text.data.rules import Rule, rows_per_epoch, rule_for
from hrm_text.data.storage import IntegerFile, Integers, IntegerWriter
from hrm_text.data.token_files import TOKEN_FILES, describe_token_files
from hrm_text.data.tokenize import MANIFEST, SPANS, refuse_unfinished, store_folders
from hrm_text.files import read_json, whole_folder, write_json
from hrm_text.settings import to_mapping

_COPY_TOKENS = 1 << 22
_OURS = ("tokens.npy", TOKEN_FILES, "metadata.json", "sampling.json", "packing")


@dataclass(slots=True)
class SampleSummary:
    """What a sampled folder holds, or would hold."""

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
    exclude: Sequence[Path] = (),
    virtual: bool = False,
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
        exclude: folders of masks; a row that one of them marks is not drawn.
        virtual: leave the tokens where they are and write down where that is; the store must stay as it is.
        on_progress: passes over a stratum done, and in all (one to copy its tokens, one for each epoch).

    Raises:
        UserError: no finished store, a damaged one, nothing to draw, or ``out`` holds something else.
    """
    _refuse_other_content(out)
    source = _Source(store, rules, epochs, seed, Limits(max_seq_len, min_resp_len, tuple(exclude)), on_progress)
    summary = source.summary
    with whole_folder(out) as beside:
        if virtual:
            source.survey_all()
            files = describe_token_files([stratum.folder / "tokens.npy" for stratum in source.strata], out)
            write_json(beside / TOKEN_FILES, files)
        else:
            source.survey_all(advance_each=False)
            _copy_tokens(source.strata, beside / "tokens.npy", int(source.info["vocab_size"]), source.advance)
        for epoch in range(epochs):
            (beside / f"epoch_{epoch}").mkdir()
            with tempfile.TemporaryFile(dir=beside) as scratch:
                counts = [_append(scratch, source.draw(number)) for number in range(len(source.strata))]
                order = source.shuffled(sum(counts))
                for name in SPANS:
                    _write_column(name, source, counts, order, scratch, beside / f"epoch_{epoch}" / f"{name}.npy")
        metadata = {
            "tokenizer_info": source.info,
            "vocab_size": None,
            "max_seq_len": max_seq_len,
            "total_length": round(sum(summary.tokens_per_epoch) / epochs),
        }
        write_json(beside / "metadata.json", metadata)
        provenance = {
            "seed": seed,
            "min_resp_len": min_resp_len,
            "exclude": [str(masks) for masks in exclude],
            "rules": [to_mapping(rule) for rule in rules],
        }
        write_json(beside / "sampling.json", provenance | asdict(summary))
    return summary


def preview_epochs(
    store: Path,
    rules: Sequence[Rule],
    epochs: int,
    seed: int = 0,
    max_seq_len: int = 4097,
    min_resp_len: int = 2,
    *,
    exclude: Sequence[Path] = (),
    on_progress: Progress | None = None,
) -> SampleSummary:
    """What ``sample_epochs`` would draw, to the token, with nothing written."""
    source = _Source(store, rules, epochs, seed, Limits(max_seq_len, min_resp_len, tuple(exclude)), on_progress)
    source.survey_all()
    for _ in range(epochs):
        samples = sum(len(source.draw(number)) for number in range(len(source.strata)))
        source.shuffled(samples)
    return source.summary


class _Source:
    """The strata of a store, their decks, and the one stream of random numbers that they share."""

    def __init__(
        self,
        store: Path,
        rules: Sequence[Rule],
        epochs: int,
        seed: int,
        limits: Limits,
        on_progress: Progress | None,
    ) -> None:
        for name, value, least in (
            ("epochs", epochs, 1),
            ("max_seq_len", limits.max_seq_len, 2),
            ("min_resp_len", limits.min_resp_len, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}, expected at least {least}")
        self.store, self.limits = store, limits
        self.folders = store_folders(store)
        self.info = _read_manifest(store)
        _refuse_mixed_tokenizers(self.folders)
        self.rules = [rule_for(folder.name, rules) for folder in self.folders]
        self.rng = np.random.Generator(np.random.Philox(seed=seed))
        self.strata: list[Stratum] = []
        self.summary = SampleSummary(
            strata=[], unused_rules=[rule.prefix for rule in rules if all(rule is not used for used in self.rules)]
        )
        self._on_progress, self._passes, self._total_passes = on_progress, 0, len(self.folders) * (1 + epochs)

    def advance(self) -> None:
        """One more pass over a stratum is done."""
        self._passes += 1
        if self._on_progress is not None:
            self._on_progress(self._passes, self._total_passes)

    def survey_all(self, advance_each: bool = True) -> None:
        """Read the index of every stratum once."""
        for folder, rule in zip(self.folders, self.rules, strict=True):
            self.strata.append(survey(folder, rule, self.limits))
            if advance_each:
                self.advance()
        self.summary.strata = [stratum.summary for stratum in self.strata]
        for before, after in itertools.pairwise(self.strata):
            after.summary.first_token = before.summary.first_token + before.num_tokens
        if not sum(stratum.num_tokens for stratum in self.strata):
            raise UserError(f"{self.store}: the store holds no token")
        self.rows_per_epoch = rows_per_epoch(self.rules, [stratum.summary.usable for stratum in self.strata])
        if not sum(self.rows_per_epoch):
            raise UserError(f"{self.store}: no row to draw; {_losses(self.summary)}")
        self._decks = [Deck(stratum.summary.usable, self.rng) for stratum in self.strata]
        self._tokens = 0

    def draw(self, number: int) -> Integers:
        """The rows of a stratum, by their place in the store, that go into this epoch."""
        stratum = self.strata[number]
        positions = self._decks[number].draw(self.rows_per_epoch[number])
        rows = stratum.rows_of(positions) if len(positions) else positions
        if len(rows) % max(stratum.summary.usable, 1) == 0:
            # Every epoch draws as many: whole decks each time.
            tokens = stratum.summary.usable_tokens * (len(rows) // max(stratum.summary.usable, 1))
        else:
            lengths = np.empty(len(rows), np.int64)
            tokens = 0
            for name in ("inst_len", "resp_len"):
                stratum.column(name, rows, lengths)
                tokens += int(lengths.sum())
        stratum.summary.drawn_rows += len(rows)
        stratum.summary.drawn_tokens += tokens
        self._tokens += tokens
        self.advance()
        return rows

    def shuffled(self, samples: int) -> Integers:
        """End an epoch: [samples], where in the order of drawing each sample comes from."""
        self.summary.samples_per_epoch.append(samples)
        self.summary.tokens_per_epoch.append(self._tokens)
        self._tokens = 0
        return permutation(samples, self.rng)


def _append(scratch: IO[bytes], rows: Integers) -> int:
    rows.tofile(scratch)
    scratch.flush()
    return len(rows)


def _write_column(
    name: str, source: _Source, counts: Sequence[int], order: Integers, scratch: IO[bytes], path: Path
) -> None:
    """Gather a column of the rows drawn, stratum after stratum, and write it in the order of training."""
    is_length = name.endswith("_len")
    column = np.empty(sum(counts), row_type(source.limits.max_seq_len) if is_length else np.int64)
    scratch.seek(0)
    done = first_token = 0
    for stratum, count in zip(source.strata, counts, strict=True):
        drawn = np.fromfile(scratch, row_type(stratum.summary.rows), count)
        part = column[done : done + count]
        if count:
            stratum.column(name, drawn, part)
        if not is_length:
            part += first_token
        first_token += stratum.num_tokens
        done += count
    with IntegerWriter(path, np.int64, len(column)) as writer:
        for chunk in chunks(len(column)):
            writer.write(column[order[chunk]])


def _refuse_other_content(out: Path) -> None:
    """A folder is replaced only where it holds nothing but what is written here."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    others = sorted(name for name in names if name not in _OURS and not name.startswith("epoch_"))
    if others:
        raise UserError(f"{out}: is not a sampled folder, it holds {others[0]}; remove it or choose another place")


def _losses(summary: SampleSummary) -> str:
    rows, excluded, short, too_long = (
        sum(getattr(stratum, name) for stratum in summary.strata)
        for name in ("rows", "excluded", "short_response", "too_long")
    )
    return (
        f"of {rows:,} rows, {excluded:,} are excluded, {short:,} have too short a response, {too_long:,} do not fit "
        f"the context, {rows - excluded - short - too_long:,} are left, of which the rules take none"
    )


def _copy_tokens(strata: Sequence[Stratum], path: Path, vocab_size: int, advance: Callable[[], None]) -> None:
    """Lay the tokens of all strata end to end in one .npy file, in the smallest type that fits."""
    dtype = np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.int32
    with IntegerWriter(path, dtype, sum(stratum.num_tokens for stratum in strata)) as writer:
        for stratum in strata:
            source = stratum.folder / "tokens.npy"
            for piece in IntegerFile(source).pieces(_COPY_TOKENS):
                if piece.max() >= vocab_size or piece.min() < 0:
                    worst = int(piece.max() if piece.max() >= vocab_size else piece.min())
                    raise UserError(
                        f"{source}: token id {worst} is outside the vocabulary of {vocab_size:,}; "
                        "tokenise its source again with the tokenizer of this store"
                    )
                writer.write(piece)
            advance()


def _read_manifest(store: Path) -> dict[str, Any]:
    """The tokenizer information of a finished store."""
    refuse_unfinished(store)
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
