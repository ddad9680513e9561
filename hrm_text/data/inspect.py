"""A look into a token store or a sampled folder: samples token by token, and the mask that they are trained under."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from hrm_text.contracts import UserError
from hrm_text.data.pack import EpochIndex, read_epoch
from hrm_text.data.storage import read_integers
from hrm_text.data.token_files import TOKEN_FILES, Tokens, open_tokens
from hrm_text.data.tokenize import MANIFEST, SPANS, store_folders
from hrm_text.data.tokenizer import load_tokenizer
from hrm_text.files import read_json

SHOWN_TOKENS = 400
"""Most tokens of a prefix, and of a response, that are decoded: a row of a store may hold a whole book."""

UNSEEN, BOTH_WAYS, CAUSAL = 0, 1, 2
"""What a query may do with a key: not see it; see it as a token of the prefix does its prefix; see it as earlier."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens of one kind."""

    text: str
    """Safe to print: see ``visible``. A control token has its name; what was left out has three dots and a count."""
    num_tokens: int
    is_control: bool
    """A control token, and no text that spells one."""
    is_left_out: bool = False


@dataclass(frozen=True, slots=True)
class SampleText:
    """A sample as it reaches the model."""

    source: str
    """Folder of a store, or the epoch, with the folder it was drawn from where that is recorded."""
    row: int
    condition: str
    """The tags whose tokens the prefix begins with; empty when there is none."""
    prefix_pieces: tuple[Piece, ...]
    response_pieces: tuple[Piece, ...]
    """All of its tokens are labels; those of the prefix are not."""
    prefix_tokens: int
    response_tokens: int

    @property
    def prefix(self) -> str:
        return "".join(piece.text for piece in self.prefix_pieces)

    @property
    def response(self) -> str:
        return "".join(piece.text for piece in self.response_pieces)

    @property
    def input_tokens(self) -> int:
        """Positions: the last token of a response is predicted, but is no input."""
        return self.prefix_tokens + max(self.response_tokens - 1, 0)

    @property
    def prefix_note(self) -> str:
        return f"prefix, {self.prefix_tokens:,} tokens at {_run(0, self.prefix_tokens)}, no labels"

    @property
    def response_note(self) -> str:
        if not self.response_tokens:
            return "response, no tokens"
        inputs = _run(self.prefix_tokens, self.input_tokens) if self.response_tokens > 1 else "no position"
        last = self.prefix_tokens - 1
        return f"response, {self.response_tokens:,} tokens at {inputs}, labels of {_run(last, self.input_tokens)}"

    def __str__(self) -> str:
        condition = f" [{self.condition}]" if self.condition else ""
        return "\n".join(
            (
                f"{self.source} row {self.row:,}{condition}",
                f"  {self.prefix_note}:",
                _indented(self.prefix),
                f"  {self.response_note}:",
                _indented(self.response),
            )
        )


def _run(start: int, stop: int) -> str:
    """The positions from ``start`` to before ``stop``, as people write them."""
    return f"position {start:,}" if stop - start == 1 else f"positions {start:,} to {stop - 1:,}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def inspect_folder(
    path: Path, limit: int, tokenizer: Path | None = None, *, source: str = "", seed: int | None = None
) -> list[SampleText]:
    """Samples of a sampled folder's first epoch, or of a token store.

    Args:
        path: a sampled folder or a token store.
        limit: most samples.
        tokenizer: the tokenizer folder, where it no longer lies at the place that the folder names.
        source: only samples of source files whose name starts so.
        seed: draw rows at random, every row alike; None takes the first of an epoch, and the first of a store's files,
            as evenly from the files as can be.

    Raises:
        UserError: ``path`` is neither, is damaged, its tokenizer is missing, or no source has that name.
    """
    rng = None if seed is None else np.random.Generator(np.random.Philox(seed=seed))
    if is_sampled(path):
        info = read_json(path / "metadata.json").get("tokenizer_info", {})
        return _of_epoch(path, _Decoder(_tokenizer(path, info, tokenizer), info), limit, source, rng)
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path}: expected a token store (with {MANIFEST}) or a sampled folder (with metadata.json and tokens)"
        )
    info = read_json(path / MANIFEST)
    return _of_store(path, _Decoder(_tokenizer(path, info, tokenizer), info), limit, source, rng)


def is_sampled(path: Path) -> bool:
    """Whether a folder looks like a sampled one, with tokens of its own or with those of a store."""
    return (path / "metadata.json").is_file() and any((path / name).is_file() for name in ("tokens.npy", TOKEN_FILES))


def _of_store(
    store: Path, decoder: _Decoder, limit: int, source: str, rng: np.random.Generator | None
) -> list[SampleText]:
    folders = [folder for folder in store_folders(store) if folder.name.startswith(source)]
    if not folders:
        raise UserError(f"{store}: no source file whose name starts with {source!r}; {_some_names(store)}")
    if rng is not None:
        # Only the headers are read here: a store may have 5,000 files and 600 million rows.
        ends = np.cumsum([len(read_integers(folder / "inst_len.npy")) for folder in folders])
        chosen = np.sort(rng.choice(int(ends[-1]), min(limit, int(ends[-1])), replace=False))
        at = np.searchsorted(ends, chosen, side="right")
        drawn = [(int(n), int(row - (ends[n - 1] if n else 0))) for n, row in zip(at, chosen, strict=True)]
    else:
        spread = [len(folders) * i // limit for i in range(limit)] if len(folders) > limit else range(len(folders))
        rows = {n: len(read_integers(folders[n] / "inst_len.npy")) for n in spread}
        firsts = [(n, row) for n in spread for row in range(min(limit, rows[n]))]
        # The first of every file, then the second of every file, until there are enough.
        drawn = sorted(sorted(firsts, key=lambda place: place[1])[:limit])
    shown = []
    for n, of_file in groupby(drawn, key=lambda place: place[0]):
        folder = folders[n]
        columns = [read_integers(folder / f"{name}.npy") for name in SPANS]
        tokens = open_tokens(folder)
        for _, row in of_file:
            if any(row >= len(column) for column in columns):
                raise UserError(f"{folder}: its index files differ in length; tokenise its source again")
            shown.append(decoder.sample(folder.name, row, tokens, [int(column[row]) for column in columns]))
    return shown


def _of_epoch(
    sampled: Path, decoder: _Decoder, limit: int, source: str, rng: np.random.Generator | None
) -> list[SampleText]:
    index, tokens = read_epoch(sampled, 0), open_tokens(sampled)
    strata = _strata(sampled)
    rows: Sequence[int] | npt.NDArray[np.int64] = range(len(index))
    if source:
        if strata is None:
            raise UserError(
                f"{sampled}: does not record which source file a sample is of; inspect the store that it was drawn from"
            )
        names, firsts = strata
        mine = [number for number, name in enumerate(names) if name.startswith(source)]
        if not mine:
            raise UserError(f"{sampled}: no source file whose name starts with {source!r}; there is {names[0]}, ...")
        rows = _rows_of(index, firsts, mine, None if rng is not None else limit)
    if rng is not None:
        rows = [int(rows[i]) for i in np.sort(rng.choice(len(rows), min(limit, len(rows)), replace=False))]
    shown = []
    for row in rows[:limit]:
        spans = [int(column[row]) for column in (index.inst_start, index.inst_len, index.resp_start, index.resp_len)]
        name = "epoch_0"
        if strata is not None:
            name += f", {strata[0][int(np.searchsorted(strata[1], spans[0], side='right')) - 1]},"
        shown.append(decoder.sample(name, int(row), tokens, spans))
    return shown


def _rows_of(
    index: EpochIndex, firsts: npt.NDArray[np.int64], mine: Sequence[int], limit: int | None
) -> npt.NDArray[np.int64]:
    """The rows of an epoch that come from some strata, in order; read in chunks, and no further than need be."""
    wanted = np.zeros(len(firsts), bool)
    wanted[mine] = True
    found: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(index), 1 << 20):
        of_chunk = np.searchsorted(firsts, index.inst_start[start : start + (1 << 20)], side="right") - 1
        found.append(start + np.flatnonzero(wanted[of_chunk]))
        if limit is not None and sum(map(len, found)) >= limit:
            break
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _strata(sampled: Path) -> tuple[list[str], npt.NDArray[np.int64]] | None:
    """Names of the source files of a sampled folder and where the tokens of each start; None if not recorded."""
    try:
        if (sampled / TOKEN_FILES).is_file():
            files = read_json(sampled / TOKEN_FILES)["files"]
            recorded = [(PurePosixPath(file["path"]).parent.name, file["first"]) for file in files]
        elif (sampled / "sampling.json").is_file():
            recorded = [
                (str(part["name"]), part["first_token"]) for part in read_json(sampled / "sampling.json")["strata"]
            ]
        else:
            return None
        firsts = np.array([first for _, first in recorded], np.int64)
    except (KeyError, TypeError, ValueError):
        return None
    sound = len(firsts) > 0 and firsts[0] == 0 and (np.diff(firsts) >= 0).all()
    return ([name for name, _ in recorded], firsts) if sound else None


def _some_names(store: Path) -> str:
    names = [folder.name for folder in store_folders(store)]
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"there is {', '.join(names[:5])}{more}" if names else "it holds none"


def _tokenizer(path: Path, info: Mapping[str, Any], given: Path | None) -> Tokenizer:
    named = info.get("tokenizer_path")
    if given is None and named is None:
        raise UserError(f"{path}: does not say which tokenizer it was made with; name one")
    folder = given or Path(str(named))
    try:
        return load_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{path}: was made with the tokenizer {folder}, which cannot be read: {error}") from None


class _Decoder:
    """Turns the ids of a sample into pieces."""

    def __init__(self, tokenizer: Tokenizer, info: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._controls = {
            index: token.content for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._spelt = re.compile("|".join(map(re.escape, sorted(self._controls.values()))) or r"(?!)")
        mapping = info.get("condition_mapping")
        self._tags = {token: tag for tag, token in mapping.items()} if isinstance(mapping, dict) else {}

    def sample(self, source: str, row: int, tokens: Tokens, spans: Sequence[int]) -> SampleText:
        inst_start, inst_len, resp_start, resp_len = spans
        if min(spans) < 0 or max(inst_start + inst_len, resp_start + resp_len) > len(tokens):
            raise UserError(f"{source} row {row}: points outside of its {len(tokens):,} tokens; write the folder again")
        # The condition tokens stand between the first token and the text.
        first = _take(tokens, inst_start, min(inst_len, 8))[1:].tolist()
        tags = [self._tags.get(self._controls.get(index, ""), "") for index in first]
        return SampleText(
            source=visible(source),
            row=row,
            condition=",".join(tags[: tags.index("")] if "" in tags else tags),
            prefix_pieces=tuple(self._ends(tokens, inst_start, inst_len)),
            response_pieces=tuple(self._ends(tokens, resp_start, resp_len)),
            prefix_tokens=inst_len,
            response_tokens=resp_len,
        )

    def _ends(self, tokens: Tokens, start: int, length: int) -> Iterator[Piece]:
        """The pieces of a span, without the middle of a long one."""
        if length <= SHOWN_TOKENS:
            yield from self._pieces(_take(tokens, start, length))
            return
        tail = SHOWN_TOKENS // 4
        yield from self._pieces(_take(tokens, start, SHOWN_TOKENS - tail))
        left_out = length - SHOWN_TOKENS
        yield Piece(f" … {left_out:,} tokens … ", left_out, is_control=False, is_left_out=True)
        yield from self._pieces(_take(tokens, start + length - tail, tail))

    def _pieces(self, ids: npt.NDArray[np.integer]) -> Iterator[Piece]:
        for is_control, run in groupby(ids.tolist(), key=self._controls.__contains__):
            of_run = list(run)
            if is_control:
                yield from (Piece(self._controls[index], 1, is_control=True) for index in of_run)
            else:
                text = visible(str(self._tokenizer.decode(of_run, skip_special_tokens=False)))
                # Text that only spells a control token has a backslash before it, so that plain print tells them apart.
                yield Piece(self._spelt.sub(r"\\\g<0>", text), len(of_run), is_control=False)


def _take(tokens: Tokens, start: int, length: int) -> npt.NDArray[np.integer]:
    return tokens.take(np.array([start], np.int64), np.array([length], np.int64))


_JOINERS = "\u200c\u200d"
"""Of scripts and of emoji: format characters, but harmless."""


def visible(text: str) -> str:
    r"""Text that is safe in a terminal: control characters, those of ANSI escapes among them, as ``\x1b``.

    Marks that change the direction of writing are escaped as well; line breaks stay as they are.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(
        letter
        if letter == "\n" or letter in _JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def mask_cells(lengths: Sequence[int], prefix_lengths: Sequence[int], size: int) -> npt.NDArray[np.uint8]:
    """The mask of a packed batch as a small picture.

    Args:
        lengths: [S]; input tokens of each sample.
        prefix_lengths: [S]
        size: most rows and columns.

    Returns:
        [N, N], N at most ``size``: for a query (row) and a key (column) UNSEEN, BOTH_WAYS or CAUSAL. A cell shows the
        pair of tokens at its middle. Fewer tokens than ``size`` become squares of several cells each.
    """
    total = sum(lengths)
    if not total:
        return np.zeros((0, 0), np.uint8)
    cells = total * (size // total) if total <= size else size
    token = ((np.arange(cells) + 0.5) * total / cells).astype(np.int64)
    ends = np.cumsum(lengths)
    sample = np.searchsorted(ends, token, side="right")
    place = token - (ends - lengths)[sample]
    in_prefix = place < np.asarray(prefix_lengths)[sample]
    together = sample[:, None] == sample
    both_ways = together & in_prefix[:, None] & in_prefix
    causal = together & (place[:, None] >= place) & ~both_ways
    return np.where(both_ways, BOTH_WAYS, np.where(causal, CAUSAL, UNSEEN)).astype(np.uint8)
