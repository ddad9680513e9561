"""The token store: records turned into token ids, one folder of plain arrays per source file.

    STORE/tokenizer_info.json           written last: a store without it is not finished
    STORE/<file name>/tokens.npy        uint32: prefix, response, prefix, response, ...
                      inst_start.npy    uint64, as the other three: where the prefix of each record starts, in tokens
                      inst_len.npy, resp_start.npy, resp_len.npy
                      metadata.json     what it was made from

A finished folder is used again as long as its source, the tokenizer and the settings are the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.engine import Engine, Progress, report
from hrm_text.data.prompt import EncodedExamples, PromptFormat
from hrm_text.data.records import BadRecord, BadRecords, LocatedExample, RecordFile, find_record_files, locate_records
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_file, tokenizer_info
from hrm_text.files import read_json, remove_leftovers, sha256, whole_folder, write_json

SPANS = ("inst_start", "inst_len", "resp_start", "resp_len")
MANIFEST = "tokenizer_info.json"
_CHUNK_RECORDS = 1024
_CHUNK_CHARACTERS = 4 << 20
"""What is encoded at a time: encodings take about a hundred bytes for each byte of text."""


@dataclass(frozen=True, slots=True)
class TokenizeSummary:
    """What a token store holds after a run."""

    files: int
    reused: int
    """Files whose folder was there already."""
    records: int
    tokens: int
    bad: BadRecords
    """Records left out, those of reused folders among the counts."""


def tokenize_files(
    inputs: Sequence[Path],
    tokenizer_dir: Path,
    out: Path,
    *,
    strict: bool = False,
    max_seq_len: int | None = None,
    engine: Engine | None = None,
    on_progress: Progress | None = None,
) -> TokenizeSummary:
    """Tokenise record files, or folders of them, into a store. Run again, it goes on from the last finished file.

    A folder of the store whose source is not among ``inputs`` is an error, for the sampler would draw from it all the
    same; nothing is deleted for you. The store's bytes do not depend on the engine.

    Args:
        inputs: files and folders, as for ``find_record_files``.
        tokenizer_dir: a tokenizer folder.
        out: the store.
        strict: stop at the first bad record.
        max_seq_len: most tokens of a sample with its last response token, that is the context plus one (the sampler's
            setting of the same name). A record whose prefix leaves no room for a response is bad (``too_long``). None
            keeps records of any length.
        engine: where files are worked on; this process by default, with the tokenizer's threads on all cores.
        on_progress: bytes of source done, and in all.

    Raises:
        UserError: no input, no tokenizer, a store of other sources, a bad record under ``strict``, or no good record.
    """
    engine = engine or Engine()
    files = find_record_files(inputs)
    info = tokenizer_info(tokenizer_dir)
    _refuse_other_sources(out, files)
    remove_leftovers(out)

    settings = {
        "tokenizer_sha256": sha256(tokenizer_file(tokenizer_dir)),
        "max_seq_len": max_seq_len,
    }
    before = {file: _finished(out / file.safe_name, file, settings, strict) for file in files}
    waiting = [file for file in files if before[file] is None]
    if waiting:
        # From here on folders of different tokenizers may stand side by side: the store is not finished.
        (out / MANIFEST).unlink(missing_ok=True)
    threads = 0 if engine.workers == 1 else 1
    engine.run(
        "tokenise",
        functools.partial(_tokenize_file, tokenizer_dir, out, settings, strict, threads),
        waiting,
        weights=[_size(file) for file in waiting],
        on_progress=on_progress,
    )

    bad = BadRecords(strict=strict)
    records = tokens = 0
    for file in files:
        metadata = before[file] or read_json(out / file.safe_name / "metadata.json")
        bad.add_counts(metadata["dropped"], () if before[file] else map(BadRecord.from_list, metadata["first_dropped"]))
        records += metadata["records"]
        tokens += metadata["tokens"]
    if not records:
        raise UserError(f"{', '.join(map(str, inputs))}: not one usable record; {bad.summary()}")
    if not (out / MANIFEST).is_file() or read_json(out / MANIFEST) != info:
        write_json(out / MANIFEST, info)
    return TokenizeSummary(files=len(files), reused=len(files) - len(waiting), records=records, tokens=tokens, bad=bad)


def _size(file: RecordFile) -> int:
    try:
        return file.path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{file.path}: was there a moment ago and is gone; give inputs that stay") from None


def store_folders(store: Path) -> list[Path]:
    """The folders of a store, one per source file, sorted by name, without what an interrupted write left."""
    if not store.is_dir():
        return []
    leftovers = (".tmp", ".old")
    folders = [path for path in store.iterdir() if path.is_dir()]
    return sorted(
        (path for path in folders if not (path.name.startswith(".") and path.suffix in leftovers)),
        key=lambda path: path.name,
    )


def refuse_unfinished(store: Path) -> None:
    """A folder whose manifest is not there is no store, or one that was being written when it was killed."""
    if not (store / MANIFEST).is_file():
        raise UserError(
            f"{store}: not a finished token store, it has no {MANIFEST}; "
            "write one with `hrm-text data tokenize`, or run that again if it was interrupted"
        )


def _refuse_other_sources(out: Path, files: Sequence[RecordFile]) -> None:
    names = {file.safe_name for file in files}
    others = [folder for folder in store_folders(out) if folder.name not in names]
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        raise UserError(
            f"{others[0]}{more}: not made from any of the inputs, yet it would be sampled with them; "
            "give its source as well, remove the folder, or choose another store"
        )


def _finished(folder: Path, file: RecordFile, settings: dict[str, Any], strict: bool) -> dict[str, Any] | None:
    """The metadata of a folder that may be used as it is, or None."""
    try:
        metadata = read_json(folder / "metadata.json")
        if {key: metadata[key] for key in settings} != settings:
            return None
        if strict and any(metadata["dropped"].values()):
            return None  # the bad records are to be met again
        source = file.path.stat()
        if metadata["source_size"] != source.st_size:
            return None
        same = metadata["source_mtime_ns"] == source.st_mtime_ns or metadata["source_sha256"] == sha256(file.path)
        return dict(metadata) if same else None
    except (UserError, KeyError, TypeError, AttributeError):
        return None  # absent, or written by another pipeline, which says too little to rely on


@functools.lru_cache(maxsize=1)
def _prompts(tokenizer_dir: Path, checksum: str) -> PromptFormat:
    """Read once by each process; the checksum tells a tokenizer from one that was at the same place before."""
    tokenizer = load_tokenizer(tokenizer_dir)
    return PromptFormat(tokenizer, tokenizer_info(tokenizer_dir, tokenizer))


def _tokenize_file(
    tokenizer_dir: Path, out: Path, settings: dict[str, Any], strict: bool, threads: int, file: RecordFile
) -> None:
    """Write the folder of one file, whole or not at all. ``threads`` of the tokenizer; 0 is one per core."""
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)  # read when the first batch of this process is encoded
    prompts = _prompts(tokenizer_dir, settings["tokenizer_sha256"])
    source_size, max_seq_len = _size(file), settings["max_seq_len"]
    source_mtime_ns = file.path.stat().st_mtime_ns
    bad = BadRecords(strict=strict)
    chunk: list[LocatedExample] = []

    def report_unreadable(record: BadRecord) -> None:
        if strict:
            write_chunk()  # a prompt further up may be too long: the first bad record is the one to stop at
        bad(record)

    with whole_folder(out / file.safe_name) as beside, StoreWriter(beside) as store:

        def write_chunk() -> None:
            encoded = prompts.encode([located.example for located in chunk])
            if max_seq_len is not None and (encoded.prefix_lengths >= max_seq_len).any():
                fits = encoded.prefix_lengths < max_seq_len
                for located, length in zip(chunk, encoded.prefix_lengths.tolist(), strict=True):
                    if length >= max_seq_len:
                        message = (
                            f"the prompt takes {length:,} tokens, which leaves no room for a response "
                            f"in a context of {max_seq_len - 1:,}"
                        )
                        bad(BadRecord(str(file.path), located.line, "too_long", message))
                lengths = encoded.prefix_lengths + encoded.response_lengths
                encoded = EncodedExamples(
                    encoded.tokens[np.repeat(fits, lengths)],
                    encoded.prefix_lengths[fits],
                    encoded.response_lengths[fits],
                )
            store.append(encoded)
            chunk.clear()

        characters = 0
        for located in locate_records(file.path, report_unreadable):
            chunk.append(located)
            characters += len(located.example.instruction) + len(located.example.response)
            if len(chunk) == _CHUNK_RECORDS or characters > _CHUNK_CHARACTERS:
                write_chunk()
                characters = 0
                report(located.bytes_read)
        write_chunk()

        metadata = {
            "source_mtime": source_mtime_ns // 10**9,
            "source_size": source_size,
            # The two keys above are those of the published layout; these are ours.
            "source_mtime_ns": source_mtime_ns,
            "source_sha256": sha256(file.path),
            **settings,
            "records": store.records,
            "tokens": store.tokens,
            "dropped": dict(bad.counts),
            "first_dropped": [list(astuple(record)) for record in bad.examples],
        }
        write_json(beside / "metadata.json", metadata)


class StoreWriter:
    """Writes the arrays of one folder of a store, in pieces: memory does not grow with the file."""

    def __init__(self, folder: Path) -> None:
        """Open the arrays for writing."""
        self.records = 0
        self.tokens = 0
        self._open = ExitStack()
        self._tokens = self._open.enter_context(ArrayFile(folder / "tokens.npy", np.dtype(np.uint32)))
        self._spans = [
            self._open.enter_context(ArrayFile(folder / f"{name}.npy", np.dtype(np.uint64))) for name in SPANS
        ]

    def append(self, encoded: EncodedExamples) -> None:
        """Add records."""
        prefixes, responses = encoded.prefix_lengths, encoded.response_lengths
        ends = np.cumsum(prefixes + responses) + self.tokens
        self._tokens.append(encoded.tokens)
        columns = (ends - responses - prefixes, prefixes, ends - responses, responses)
        for file, column in zip(self._spans, columns, strict=True):
            file.append(column)
        self.records += len(prefixes)
        self.tokens += len(encoded.tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Complete the arrays."""
        self._open.close()


class ArrayFile:
    """A one-dimensional .npy file that is written in pieces; its length need not be known before."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        """Open ``path`` for writing, as an array of no elements."""
        self._dtype = dtype
        self._length = 0
        self._file = path.open("wb")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values, [N], converted to the type of the file."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        self._length += len(values)

    def _write_header(self) -> None:
        header = {"shape": (self._length,), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(self._dtype)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the length that it came to."""
        with self._file:
            self._file.seek(0)
            self._write_header()
            # NumPy pads headers so that any length fits: https://numpy.org/neps/nep-0001-npy-format.html
            assert self._file.tell() == self._data_start
