"""Files that are whole or absent: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SURELY_DEAD_SECONDS = 600.0


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it over ``path`` once it is complete and on disk.

    After an error the file beside is removed and ``path`` is as it was.
    """
    _make_parent(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained_disk_errors(path):
            yield beside
            sync(beside)
            os.replace(beside, path)
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside ``path`` to fill; rename it to ``path``, replacing what was there, once it is complete."""
    _make_parent(path)
    if path.is_file():
        raise UserError(f"{path}: is a file, expected a folder or nothing; choose another place")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with explained_disk_errors(path):
            beside.mkdir()
            yield beside
            for file in sorted(beside.rglob("*")):
                sync(file)
            sync(beside)
            if path.exists():
                os.replace(path, replaced)
            os.replace(beside, path)
            sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Keep every other process that asks for the same out of a folder, which is made if it is not there.

    The system takes the lock back when a process ends, however it ends; so a kill leaves nothing that stands in the
    way. Where the system or the file system knows no such locks, nobody is kept out.

    Raises:
        UserError: another process is at it.
    """
    lock = folder / ".lock"
    _make_parent(lock)
    with explained_disk_errors(folder):
        descriptor = _locked(lock)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: whoever has opened it by now sees that it is gone
        os.close(descriptor)


def _locked(lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"{lock.parent}: {holder} is writing to this folder; wait until it has ended, or choose another folder"
            ) from None
        except FileNotFoundError:
            pass  # who held it before has just removed it
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_alive(process: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder, beside files and folders that they were writing.

    Left alone is what a process of this machine may still be writing, and, as another machine may be at it, whatever
    was written to in the last ten minutes.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        found = re.fullmatch(r"\..+\.(\d+)\.(tmp|old)", path.name)
        if found is None or is_alive(int(found[1])):
            continue
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        if time.time() - max(each.stat().st_mtime for each in inside) < _SURELY_DEAD_SECONDS:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, an exceeded quota or limit, or a refused permission into a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; nothing that existed was changed. "
                "Free some space and run the same command again."
            ) from error
        if error.errno == errno.EFBIG:
            raise UserError(
                f"{path}: a file exceeds the largest size allowed here; nothing that existed was changed. "
                "Raise the limit (ulimit -f) or choose a place on another file system."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{path}: may not be written ({error.strerror}); choose another place") from error
        raise


def _make_parent(path: Path) -> None:
    try:
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        in_the_way = next(folder for folder in path.parents if folder.exists())
        raise UserError(f"{path}: {in_the_way} is a file, expected a folder; choose another place") from None


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as beside:
        # Half a surrogate pair, which data may hold, has no UTF-8; its escape is JSON's own.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def sha256(path: Path) -> str:
    """Checksum of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
