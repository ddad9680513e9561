"""Decks: every file of a token store is a stratum, and a deck of rows that epochs are dealt from.

A stratum is read a piece at a time. What stays in memory is four bytes for each row of a deck that was begun and not
finished, a bit for each row of a stratum with rows that are not in use, and the piece at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.rules import Rule
from hrm_text.data.storage import IntegerFile, Integers
from hrm_text.data.tokenize import SPANS

PIECE_ROWS = 1 << 23
"""64 MiB of a column."""
CHUNK_ROWS = 1 << 20
"""Rows gathered or written at a time."""


@dataclass(slots=True)
class StratumSummary:
    """What became of one source file."""

    name: str
    rule: str
    """Prefix of the rule that applies."""
    rows: int = 0
    """Rows in the store. Of these are lost:"""
    excluded: int = 0
    """rows that a mask leaves out,"""
    short_response: int = 0
    """rows whose response has fewer than ``min_resp_len`` tokens, and"""
    too_long: int = 0
    """rows that do not fit the context: the prefix fills it, or the rule drops what would have to be cut."""
    truncated: int = 0
    """Rows in use whose response is cut."""
    usable: int = 0
    """Rows in use."""
    usable_tokens: int = 0
    """Tokens of the rows in use."""
    drawn_rows: int = 0
    """Over all epochs, repeats included."""
    drawn_tokens: int = 0
    """Over all epochs, repeats included."""
    first_token: int = 0
    """Where its tokens start among those of all strata."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Which rows are fit for use."""

    max_seq_len: int
    """Most tokens of prefix and response together."""
    min_resp_len: int
    """Least tokens of a response, before it is cut."""
    exclude: tuple[Path, ...] = ()
    """Folders of masks: a row that one of them marks is left out."""


@dataclass(slots=True)
class Stratum:
    """One file of the store, surveyed."""

    folder: Path
    limits: Limits
    summary: StratumSummary
    num_tokens: int
    _kept: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    """Packed bits of the rows in use; None where all are."""

    def rows_of(self, positions: Integers) -> Integers:
        """The rows of the store at some positions among the rows in use."""
        if self._kept is None:
            return positions
        kept = np.unpackbits(self._kept, count=self.summary.rows)
        return np.flatnonzero(kept).astype(row_type(self.summary.rows))[positions]

    def column(self, name: str, rows: Integers, out: Integers) -> None:
        """Write a column at some rows, in their order, to ``out``; a response as it is after cutting."""
        for start, piece in self._pieces(name):
            if len(piece) == self.summary.rows:
                for chunk in chunks(len(rows)):
                    out[chunk] = piece[rows[chunk]]
                return
            for chunk in chunks(len(rows)):
                of_chunk = rows[chunk]
                here = np.flatnonzero((of_chunk >= start) & (of_chunk < start + len(piece)))
                out[chunk.start + here] = piece[of_chunk[here] - start]

    def _pieces(self, name: str) -> Iterator[tuple[int, Integers]]:
        """The pieces of a column, each with the row it starts at."""
        column = IntegerFile(self.folder / f"{name}.npy")
        prefixes = IntegerFile(self.folder / "inst_len.npy") if name == "resp_len" else None
        for start in range(0, len(column), PIECE_ROWS):
            piece = signed(column.read(start, start + PIECE_ROWS))
            if prefixes is not None:
                inst_len = signed(prefixes.read(start, start + PIECE_ROWS))
                piece = np.minimum(piece, room_for_response(inst_len, self.limits.max_seq_len))
            yield start, piece


def survey(folder: Path, rule: Rule, limits: Limits) -> Stratum:
    """Read a file's index once: which rows are in use, and what becomes of the others.

    Raises:
        UserError: an index file is missing or damaged, or points outside of the tokens.
    """
    columns = [IntegerFile(folder / f"{name}.npy") for name in SPANS]
    if len({len(column) for column in columns}) != 1:
        raise UserError(f"{folder}: its index files differ in length; tokenise its source again")
    num_tokens = len(IntegerFile(folder / "tokens.npy"))
    summary = StratumSummary(folder.name, rule.prefix, rows=len(columns[0]))
    excluded = _excluded(folder, summary.rows, limits)
    packed = []
    for chunk in chunks(summary.rows):
        inst_start, inst_len, resp_start, resp_len = (
            signed(column.read(chunk.start, chunk.stop)) for column in columns
        )
        for start, length in ((inst_start, inst_len), (resp_start, resp_len)):
            if start.min() < 0 or length.min() < 0 or (length > num_tokens - start).any():
                raise UserError(f"{folder}: an index points outside of tokens.npy; tokenise its source again")
        room = room_for_response(inst_len, limits.max_seq_len)
        left = np.ones(len(room), np.bool_) if excluded is None else ~excluded[chunk]
        long_enough = resp_len >= limits.min_resp_len
        fits = room >= 1 if rule.long_context == "truncate" else resp_len <= room
        kept = left & long_enough & fits
        packed.append(np.packbits(kept))
        summary.excluded += int((~left).sum())
        summary.short_response += int((left & ~long_enough).sum())
        summary.too_long += int((left & long_enough & ~fits).sum())
        summary.truncated += int((kept & (room < resp_len)).sum())
        summary.usable += int(kept.sum())
        summary.usable_tokens += int((inst_len + np.minimum(resp_len, room))[kept].sum())
    every = summary.usable == summary.rows
    return Stratum(folder, limits, summary, num_tokens, None if every else np.concatenate(packed))


class Deck:
    """The rows of a stratum in random order: dealt until none is left, then shuffled again."""

    def __init__(self, rows: int, rng: np.random.Generator) -> None:
        """Nothing is shuffled before the first draw."""
        self._rows = rows
        self._rng = rng
        self._order: Integers = np.empty(0, row_type(rows))

    def draw(self, count: int) -> Integers:
        """The next rows, [count]; a count above the number of rows goes through the deck more than once."""
        assert count == 0 or self._rows > 0
        hand = np.empty(count, row_type(self._rows))
        dealt = 0
        while dealt < count:
            if not len(self._order):
                self._order = permutation(self._rows, self._rng)
            taken = min(count - dealt, len(self._order))
            hand[dealt : dealt + taken] = self._order[:taken]
            dealt += taken
            self._order = self._order[taken:].copy()  # a view would keep what was dealt in memory
        return hand


def permutation(length: int, rng: np.random.Generator) -> Integers:
    """``rng.permutation(length)``, number for number, in the smallest type: half of the memory for most lengths."""
    order = np.arange(length, dtype=row_type(length))
    rng.shuffle(order)
    return order


def row_type(rows: int) -> npt.DTypeLike:
    """The type that numbers so many rows."""
    return np.int32 if rows < 1 << 31 else np.int64


def chunks(rows: int) -> Iterator[slice]:
    """So many rows, some at a time. A multiple of eight: bits of whole bytes."""
    return (slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS))


def signed(column: Integers) -> npt.NDArray[np.int64]:
    """A column as int64, whichever type it is stored in."""
    return column.astype(np.int64, copy=False)


def room_for_response(inst_len: npt.NDArray[np.int64], max_seq_len: int) -> npt.NDArray[np.int64]:
    """Tokens that prefixes leave to their responses; 0 where a prefix fills the context."""
    return max_seq_len - np.minimum(inst_len, max_seq_len)


def _excluded(folder: Path, rows: int, limits: Limits) -> npt.NDArray[np.bool_] | None:
    """[rows]; the rows that any of the masks marks."""
    if not limits.exclude:
        return None
    from hrm_text.data.masks import excluded_rows

    return excluded_rows(limits.exclude, folder, rows)
