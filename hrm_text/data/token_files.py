"""The tokens of a sampled folder: its own ``tokens.npy``, or the files of a store that a manifest lays end to end.

    token_files.json    {"files": [{"path": "../store/a.jsonl/tokens.npy",   relative to the sampled folder, or a URL
                                    "first": 0, "length": 81,                number of its first token, and how many
                                    "dtype": "uint32", "size": 452,          of the file, in bytes
                                    "mtime_ns": ..., "fingerprint": ...}]}   to notice a change

A fingerprint is the SHA-256 of blocks spread over the file: reading all of a corpus would take hours. A file whose time
changed and whose size and fingerprint did not is the same file, copied.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.storage import (
    Block,
    BlockCache,
    Header,
    Integers,
    Location,
    explained_access,
    file_system,
    location,
    names_in,
    read_header,
    read_integers,
    read_json_at,
    under,
)

TOKEN_FILES = "token_files.json"
_PROBES = 16
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TokenFile:
    """One file of the manifest."""

    path: str
    first: int
    length: int
    dtype: str
    size: int
    mtime_ns: int
    fingerprint: str


def describe_token_files(files: Sequence[Path], sampled: Path) -> dict[str, Any]:
    """The manifest of a sampled folder whose tokens are those of ``files``, end to end."""
    described: list[TokenFile] = []
    first = 0
    for file in files:
        header, stat = read_header(file), file.stat()
        path = Path(os.path.relpath(file.resolve(), sampled.resolve())).as_posix()
        described.append(
            TokenFile(
                path, first, header.length, header.dtype.name, stat.st_size, stat.st_mtime_ns,
                fingerprint(file, stat.st_size),
            )
        )  # fmt: skip
        first += header.length
    return {"files": [asdict(file) for file in described]}


def fingerprint(place: Location, size: int) -> str:
    """The SHA-256, as hexadecimal digits, of blocks spread evenly over a file, its beginning and end among them."""
    last = max(size - _PROBE_BYTES, 0)
    starts = sorted({last * probe // (_PROBES - 1) for probe in range(_PROBES)})
    digest = hashlib.sha256()
    if isinstance(place, Path):
        with place.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_PROBE_BYTES))
        return digest.hexdigest()
    system, path = file_system(place)
    ends = [min(start + _PROBE_BYTES, size) for start in starts]
    for content in system.cat_ranges([path] * len(starts), starts, ends, on_error="raise"):
        digest.update(content)
    return digest.hexdigest()


class Tokens:
    """The tokens of a sampled folder, numbered from 0 through all of its files. Threads may share it.

    Files here are mapped into memory when they are first needed; of files behind a URL only the blocks asked for are
    fetched.
    """

    def __init__(
        self, name: Location, files: Sequence[Location], lengths: Sequence[int], expected: Sequence[TokenFile] = ()
    ) -> None:
        """``name``: for messages. ``expected``: what each file has to be, checked when it is first opened."""
        self.name = name
        self._files, self._expected = list(files), list(expected)
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])
        self._open: dict[int, Integers | Header] = {}
        self._lock = threading.Lock()
        self._cache = BlockCache()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def crossing(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        """Which spans, none of them empty, begin in one file and end in another: none of a sound folder."""
        if len(self._files) == 1:
            return np.empty(0, np.intp)
        return np.flatnonzero(self._files_of(starts) != self._files_of(starts + lengths - 1))

    def take(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> Integers:
        """The tokens of some spans, end to end; no span reaches from one file into the next.

        Raises:
            UserError: a file is missing, is not what it was, or cannot be reached.
        """
        if len(self._files) == 1 and isinstance(whole := self._opened(0), np.ndarray):
            ends = np.cumsum(lengths)
            total = int(ends[-1]) if len(ends) else 0
            return whole[np.arange(total) + np.repeat(starts - (ends - lengths), lengths)]
        filled = lengths > 0
        starts, lengths = starts[filled], lengths[filled]
        files = self._files_of(starts)
        spans = list(zip(files.tolist(), (starts - self._firsts[files]).tolist(), lengths.tolist(), strict=True))
        blocks: list[Block] = []
        for file, start, length in spans:
            opened = self._opened(file)
            if isinstance(opened, Header):
                blocks += self._blocks(file, opened, start, length)
        content = self._cache.fetch(blocks) if blocks else {}
        taken: list[Integers] = [] if spans else [np.empty(0, np.int64)]
        for file, start, length in spans:
            opened = self._opened(file)
            if isinstance(opened, np.ndarray):
                taken.append(opened[start : start + length])
                continue
            needed = self._blocks(file, opened, start, length)
            joined = b"".join(content[block] for block in needed)
            at = opened.offset + start * opened.dtype.itemsize - needed[0][1] * self._cache.block_bytes
            if len(joined) < at + length * opened.dtype.itemsize:
                raise UserError(f"{self._files[file]}: is shorter than its header says; write the folder again")
            taken.append(np.frombuffer(joined, opened.dtype, length, at))
        return np.concatenate(taken)

    def _files_of(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        # Of files without a token, which begin where the next one does, the last is not one of them.
        return np.searchsorted(self._firsts[:-1], tokens, side="right") - 1

    def _blocks(self, file: int, header: Header, start: int, length: int) -> list[Block]:
        """The blocks of a file behind a URL that a span lies in."""
        size = self._cache.block_bytes
        begin = header.offset + start * header.dtype.itemsize
        end = begin + length * header.dtype.itemsize
        return [(str(self._files[file]), number) for number in range(begin // size, -(-end // size))]

    def _opened(self, file: int) -> Integers | Header:
        """The array of a file here, the header of one behind a URL."""
        opened = self._open.get(file)
        if opened is None:
            with self._lock:
                opened = self._open.get(file)
                if opened is None:
                    place = self._files[file]
                    if self._expected:
                        check_unchanged(place, self._expected[file])
                    opened = self._open[file] = read_integers(place) if isinstance(place, Path) else read_header(place)
        return opened


def open_tokens(sampled: Location) -> Tokens:
    """The tokens of a sampled folder of either layout.

    Raises:
        UserError: there are none, the manifest is damaged, or a file here is missing or has changed. (A file behind a
            URL is checked when it is first needed.)
    """
    if TOKEN_FILES not in names_in(sampled):
        tokens = under(sampled, "tokens.npy")
        return Tokens(tokens, [tokens], [read_header(tokens).length])
    manifest = under(sampled, TOKEN_FILES)
    files = _read_token_files(manifest)
    places = [_place(sampled, file.path) for file in files]
    for place, file in zip(places, files, strict=True):
        if isinstance(place, Path):
            check_unchanged(place, file)
    return Tokens(manifest, places, [file.length for file in files], files)


def check_unchanged(place: Location, expected: TokenFile) -> None:
    """Raise a UserError where a file is not the one that was sampled."""
    again = "put it back, or sample the data again"
    if isinstance(place, Path):
        if not place.is_file():
            raise UserError(f"{place}: no such file, but {TOKEN_FILES} takes tokens from there; {again}")
        stat = place.stat()
        size, same_time = stat.st_size, stat.st_mtime_ns == expected.mtime_ns
    else:
        with explained_access(place):
            system, path = file_system(place)
            if not system.exists(path):
                raise UserError(f"{place}: no such file, but {TOKEN_FILES} takes tokens from there; {again}")
            size, same_time = int(system.size(path)), False
    if size != expected.size:
        raise UserError(f"{place}: has {size:,} bytes, but had {expected.size:,} when it was sampled; {again}")
    if not same_time:
        with explained_access(str(place)):
            found = fingerprint(place, size)
        if found != expected.fingerprint:
            raise UserError(f"{place}: its content has changed since it was sampled; {again}")


def _read_token_files(manifest: Location) -> list[TokenFile]:
    content = read_json_at(manifest)
    try:
        files = [TokenFile(**file) for file in content["files"]]
        lengths = [0, *np.cumsum([file.length for file in files]).tolist()]
        sound = bool(files) and all(
            type(getattr(file, name)) is int for file in files for name in ("first", "length", "size", "mtime_ns")
        )
    except (TypeError, KeyError):
        sound = False
    if not sound or [file.first for file in files] != lengths[:-1] or min(file.length for file in files) < 0:
        raise UserError(f"{manifest}: expected files that follow one another; sample the data again")
    return files


def _place(sampled: Location, path: str) -> Location:
    """Where a file of the manifest is: a URL, or a path from the sampled folder on."""
    if "://" in path:
        return location(path)
    if isinstance(sampled, Path):
        return sampled / path
    protocol, _, folder = sampled.partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(folder, path))}"
