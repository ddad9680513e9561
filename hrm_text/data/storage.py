"""Storage: rows of integers in ``.npy`` files, on this machine or behind a URL.

A sampled folder may lie on this machine or in an object store. Files here are mapped into memory or read piece by
piece; index files behind a URL are fetched whole, tokens in blocks, through a cache of bounded size.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.files import read_json

Location = Path | str
"""A path of this machine, or a URL that fsspec opens, such as s3://bucket/folder. A URL stays text: a path would turn
its two slashes into one."""

Integers = npt.NDArray[np.integer]


def location(place: Location) -> Location:
    """A URL as text, anything else as a path; file:// is a path of this machine."""
    if isinstance(place, str) and place.startswith("file://"):
        return Path(place.removeprefix("file://"))
    return place if isinstance(place, str) and "://" in place else Path(place)


def under(folder: Location, *names: str) -> Location:
    """A file or folder inside ``folder``."""
    return folder.joinpath(*names) if isinstance(folder, Path) else "/".join([folder.rstrip("/"), *names])


def read_json_at(place: Location) -> Any:
    """Read JSON from a path or a URL.

    Raises:
        UserError: it is missing, cannot be reached, or is damaged.
    """
    if isinstance(place, Path):
        return read_json(place)
    with explained_access(place), opened(place) as file:
        content = file.read()
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: not valid JSON: {error}") from None


def names_in(folder: Location) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    with explained_access(folder):
        system, path = file_system(folder)
        try:
            return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in system.ls(path, detail=False))
        except FileNotFoundError:
            return []


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path within it."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, str(path)


def opened(url: str) -> Any:
    """A file behind a URL, open for reading."""
    system, path = file_system(url)
    return system.open(path, "rb")


@contextlib.contextmanager
def explained_access(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way to a URL into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; a sampled folder is made by `hrm-text data sample`") from None
    except ImportError as error:
        raise UserError(f"{url}: needs a package that is not installed ({error})") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{url}: cannot be read ({error}); check the address and the rights to it") from None


# ------------------------------------------------------------------------------------------------------ whole arrays --


def read_integers(place: Location) -> Integers:
    """Map a one-dimensional ``.npy`` file of any integer type into memory, read-only.

    A file behind a URL is copied to an unnamed temporary file first, which goes when the array does: what is mapped
    can be dropped from memory, what is read cannot. The plain array over the map comes back: indexing an ``np.memmap``
    costs twice as much for 1,000 tokens and seven times as much for 20.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    header = read_header(place)
    if not header.length:
        return np.empty(0, header.dtype)
    if isinstance(place, Path):
        mapped = np.memmap(place, header.dtype, "r", header.offset, (header.length,))
    else:
        with explained_access(place), opened(place) as file, tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy, 1 << 22)
            copy.flush()
            mapped = np.memmap(copy, header.dtype, "r", header.offset, (header.length,))
    return np.asarray(mapped)


@dataclass(frozen=True, slots=True)
class Header:
    """What an ``.npy`` file of integers says of itself."""

    dtype: np.dtype[Any]
    length: int
    """Numbers."""
    offset: int
    """Bytes before the first number."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.offset + self.length * self.dtype.itemsize


def read_header(place: Location) -> Header:
    """Read the beginning of an ``.npy`` file of integers.

    Raises:
        UserError: the file is missing, cut short, or holds something else.
    """
    if isinstance(place, Path):
        try:
            with place.open("rb") as file:
                header, size = _parse(file, place), place.stat().st_size
        except FileNotFoundError:
            raise UserError(f"{place}: no such file; a sampled folder is made by `hrm-text data sample`") from None
        except OSError as error:
            raise UserError(f"{place}: not a readable .npy file ({error}); write the folder again") from None
    else:
        with explained_access(place), opened(place) as file:
            header, size = _parse(file, place), int(file.size)
    if size < header.size:
        raise UserError(
            f"{place}: not a readable .npy file ({size:,} bytes of {header.size:,}); write the folder again"
        )
    return header


def _parse(file: IO[bytes], place: Location) -> Header:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (ValueError, EOFError) as error:
        raise UserError(f"{place}: not a readable .npy file ({error}); write the folder again") from None
    if len(shape) != 1 or not np.issubdtype(dtype, np.integer):
        raise UserError(f"{place}: expected a row of integers, found {dtype} of shape {shape}")
    return Header(np.dtype(dtype), int(shape[0]), file.tell())


# ---------------------------------------------------------------------------------------------- piece by piece, here --


class IntegerFile:
    """An ``.npy`` file of integers on this machine, of which only the piece asked for is in memory.

    Pages of a map that were touched count as memory of the process, however little of it is needed at a time.
    """

    def __init__(self, path: Path) -> None:
        """Read the header; see ``read_header`` for the errors."""
        self.path = path
        self.header = read_header(path)

    def __len__(self) -> int:
        return self.header.length

    def read(self, start: int, stop: int) -> Integers:
        """The numbers from ``start`` to ``stop``, or to the end."""
        stop = min(stop, len(self))
        at = self.header.offset + start * self.header.dtype.itemsize
        return np.fromfile(self.path, self.header.dtype, stop - start, offset=at)

    def pieces(self, size: int) -> Iterator[Integers]:
        """All numbers, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, start + size)


class IntegerWriter:
    """Writes an ``.npy`` file of known length piece by piece; the same bytes as ``np.save``."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, length: int) -> None:
        """Open the file and write its header."""
        self._dtype, self._left = np.dtype(dtype), length
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, piece: Integers) -> None:
        """Append a piece, in the type of the file."""
        self._left -= len(piece)
        self._file.write(np.ascontiguousarray(piece, self._dtype).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or self._left == 0, self._left


# --------------------------------------------------------------------------------------------------------- far files --

Block = tuple[str, int]
"""URL and number of the block."""


class BlockCache:
    """Blocks of files behind URLs, the most recently used ones kept. Threads may share it."""

    def __init__(self, block_bytes: int = 1 << 16, most_blocks: int = 1 << 12) -> None:
        """By default 256 MiB; a block holds about 50 samples of the published mixture's length."""
        self.block_bytes = block_bytes
        self._most_blocks = most_blocks
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Block, bytes] = OrderedDict()

    def fetch(self, blocks: Sequence[Block]) -> dict[Block, bytes]:
        """The content of some blocks; those not here are asked for all at once, which hides how long each takes."""
        found: dict[Block, bytes] = {}
        with self._lock:
            for block in blocks:
                if block in self._blocks:
                    self._blocks.move_to_end(block)
                    found[block] = self._blocks[block]
        missing = sorted(set(blocks) - set(found))
        by_system: dict[int, tuple[Any, list[Block], list[str]]] = {}
        for block in missing:
            with explained_access(block[0]):
                system, path = file_system(block[0])
            _, of_system, paths = by_system.setdefault(id(system), (system, [], []))
            of_system.append(block)
            paths.append(path)
        for system, of_system, paths in by_system.values():
            starts = [number * self.block_bytes for _, number in of_system]
            ends = [start + self.block_bytes for start in starts]
            with explained_access(of_system[0][0]):
                contents = system.cat_ranges(paths, starts, ends, on_error="raise")
            found.update(zip(of_system, map(bytes, contents), strict=True))
        with self._lock:
            for block in missing:
                self._blocks[block] = found[block]
            while len(self._blocks) > self._most_blocks:
                self._blocks.popitem(last=False)
        return found
