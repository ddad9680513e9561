"""The token store: records turned into token ids, one folder of plain arrays per source file.

    STORE/tokenizer_info.json           written last: a store without it is not finished
    STORE/<file name>/tokens.npy        uint32: prefix, response, prefix, response, ...
                      inst_start.npy    uint64, as the other three: where the prefix of each record starts, in tokens
                      inst_len.npy, resp_start.npy, resp_len.npy
                      metadata.json     what it was made from

A finished folder is used again as long as its source, the tokenizer and the settings are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.records import BadRecord, BadRecords, LocatedExample, RecordFile, find_record_files, locate_records
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_file, tokenizer_info
from hrm_text.files import read_json, sha256, whole_folder, write_json

SPANS = ("inst_start", "inst_len", "resp_start", "resp_len")
MANIFEST = "tokenizer_info.json"
_CHUNK_RECORDS = 1024

Progress = Callable[[int, int], None]
"""Called with what is done and the total, in the unit that the function names."""


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
    on_progress: Progress | None = None,
) -> TokenizeSummary:
    """Tokenise record files, or folders of them, into a store. Run again, it goes on from the last finished file.

    A folder of the store whose source is not among ``inputs`` is an error, for the sampler would draw from it all the
    same; nothing is deleted for you.

    Args:
        inputs: files and folders, as for ``find_record_files``.
        tokenizer_dir: a tokenizer folder.
        out: the store.
        strict: stop at the first bad record.
        max_seq_len: most tokens of a sample with its last response token, that is the context plus one (the sampler's
            setting of the same name). A record whose prefix leaves no room for a response is bad (``too_long``). None
            keeps records of any length.
        on_progress: bytes of source done, and in all.

    Raises:
        UserError: no input, no tokenizer, a store of other sources, a bad record under ``strict``, or no good record.
    """
    files = find_record_files(inputs)
    info = tokenizer_info(tokenizer_dir)
    prompts = PromptFormat(load_tokenizer(tokenizer_dir), info)
    _refuse_other_sources(out, files)

    settings = {
        "tokenizer_sha256": sha256(tokenizer_file(tokenizer_dir)),
        "max_seq_len": max_seq_len,
    }
    finished = {file: _finished(out / file.safe_name, file, settings, strict) for file in files}
    if not all(finished.values()):
        # From here on folders of different tokenizers may stand side by side: the store is not finished.
        (out / MANIFEST).unlink(missing_ok=True)

    bad = BadRecords(strict=strict)
    sizes = {file: file.path.stat().st_size for file in files}
    total, done = sum(sizes.values()), 0
    records = tokens = 0
    for file in files:
        metadata = finished[file]
        if metadata is None:

            def on_bytes(read: int, before: int = done) -> None:
                if on_progress is not None:
                    on_progress(min(before + read, total), total)

            metadata = _tokenize_file(file, out / file.safe_name, prompts, settings, bad, on_bytes)
        else:
            bad.add_counts(metadata["dropped"])
        records += metadata["records"]
        tokens += metadata["tokens"]
        done += sizes[file]
        if on_progress is not None:
            on_progress(done, total)
    if not records:
        raise UserError(f"{', '.join(map(str, inputs))}: not one usable record; {bad.summary()}")
    if not (out / MANIFEST).is_file() or read_json(out / MANIFEST) != info:
        write_json(out / MANIFEST, info)
    reused = sum(metadata is not None for metadata in finished.values())
    return TokenizeSummary(files=len(files), reused=reused, records=records, tokens=tokens, bad=bad)


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


def _tokenize_file(
    file: RecordFile,
    folder: Path,
    prompts: PromptFormat,
    settings: dict[str, Any],
    bad: BadRecords,
    on_bytes: Callable[[int], None],
) -> dict[str, Any]:
    """Write the folder of one file, whole or not at all; returns its metadata."""
    source = file.path.stat()
    dropped: Counter[str] = Counter()
    max_seq_len = settings["max_seq_len"]
    chunk: list[LocatedExample] = []

    def report(record: BadRecord) -> None:
        dropped[record.kind] += 1
        bad(record)

    def report_unreadable(record: BadRecord) -> None:
        if bad.strict:
            write_chunk()  # a prompt further up may be too long: the first bad record is the one to stop at
        report(record)

    with whole_folder(folder) as beside, StoreWriter(beside) as store:

        def write_chunk() -> None:
            examples = [located.example for located in chunk]
            prefixes = prompts.prefix_ids_batch(
                [example.condition for example in examples], [example.instruction for example in examples]
            )
            responses = prompts.response_ids_batch([example.response for example in examples])
            kept = []
            for index, (located, prefix) in enumerate(zip(chunk, prefixes, strict=True)):
                if max_seq_len is None or len(prefix) < max_seq_len:
                    kept.append(index)
                    continue
                message = (
                    f"the prompt takes {len(prefix):,} tokens, which leaves no room for a response "
                    f"in a context of {max_seq_len - 1:,}"
                )
                report(BadRecord(str(file.path), located.line, "too_long", message))
            store.append([prefixes[index] for index in kept], [responses[index] for index in kept])
            chunk.clear()

        for located in locate_records(file.path, report_unreadable):
            chunk.append(located)
            if len(chunk) == _CHUNK_RECORDS:
                write_chunk()
                on_bytes(located.bytes_read)
        write_chunk()

        metadata = {
            "source_mtime": int(source.st_mtime),
            "source_size": source.st_size,
            # The two keys above are those of the published layout; these are ours.
            "source_mtime_ns": source.st_mtime_ns,
            "source_sha256": sha256(file.path),
            **settings,
            "records": store.records,
            "tokens": store.tokens,
            "dropped": dict(dropped),
        }
        write_json(beside / "metadata.json", metadata)
    return metadata


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

    def append(self, prefixes: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        """Add records, given as the ids of each prefix and of each response."""
        pieces = [piece for pair in zip(prefixes, responses, strict=True) for piece in pair]
        lengths = np.array([len(piece) for piece in pieces], dtype=np.uint64)
        ends = np.cumsum(lengths, dtype=np.uint64)
        starts = ends - lengths + np.uint64(self.tokens)
        added = int(ends[-1]) if pieces else 0
        self._tokens.append(np.fromiter(chain.from_iterable(pieces), np.uint32, added))
        columns = (starts[0::2], lengths[0::2], starts[1::2], lengths[1::2])
        for file, column in zip(self._spans, columns, strict=True):
            file.append(column)
        self.records += len(prefixes)
        self.tokens += added

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
