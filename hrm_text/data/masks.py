"""Masks: which rows of a token store to leave out, kept beside the store, which stays as it is.

    MASKS/<folder name>.npy     bool, [rows of that folder]; True is a row to leave out
          mask.json             kind, settings, and of every folder its identity and counts
          coverage.jsonl        of contamination alone: every question of the benchmarks

A mask holds for the store it was made of: `read_mask` compares the folder that it is asked for with the identity noted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.storage import read_integers
from hrm_text.data.tokenize import SPANS
from hrm_text.files import read_json, whole_folder, write_json

MASK_MANIFEST = "mask.json"
COVERAGE = "coverage.jsonl"
_BLOCKS = 16
_BLOCK_TOKENS = 1024
_HASH_ROWS = 1 << 20


def read_mask(masks_dir: Path, folder: Path, rows: int) -> npt.NDArray[np.bool_]:
    """The rows of one folder of a store that a mask leaves out.

    Args:
        masks_dir: folder of masks.
        folder: of the store, such as ``STORE/flan__a.parquet``.
        rows: how many rows it has.

    Returns:
        [rows]; True is a row to leave out.

    Raises:
        UserError: there is no mask, it is damaged, or it was made of another store or of an earlier state of this one.
    """
    noted = read_manifest(masks_dir)["folders"].get(folder.name)
    again = "make the mask again from this store"
    if noted is None:
        raise UserError(f"{masks_dir}: was made of a store without {folder.name}; {again}")
    if noted["identity"].get("rows") != rows:
        raise UserError(
            f"{masks_dir}: is of {noted['identity'].get('rows')} rows of {folder}, which has {rows}; {again}"
        )
    if noted["identity"] != folder_identity(folder):
        raise UserError(f"{masks_dir}: {folder} has changed since the mask was made of it; {again}")
    path = masks_dir / f"{folder.name}.npy"
    try:
        mask = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable mask ({error}); {again}") from None
    if mask.dtype != np.bool_ or mask.shape != (rows,):
        raise UserError(f"{path}: expected {rows} booleans, found {mask.dtype} of shape {mask.shape}; {again}")
    return np.asarray(mask)


def excluded_rows(masks_dirs: Sequence[Path], folder: Path, rows: int) -> npt.NDArray[np.bool_]:
    """The rows of one folder of a store that any of some masks leaves out, [rows]; none without masks.

    Raises:
        UserError: as ``read_mask``.
    """
    excluded = np.zeros(rows, np.bool_)
    for masks_dir in masks_dirs:
        excluded |= read_mask(masks_dir, folder, rows)
    return excluded


def read_manifest(masks_dir: Path) -> dict[str, Any]:
    """The content of a mask's ``mask.json``: kind, settings, folders, report.

    Raises:
        UserError: there is none, or it is no such thing.
    """
    path = masks_dir / MASK_MANIFEST
    if not path.is_file():
        raise UserError(
            f"{masks_dir}: no folder of masks, it has no {MASK_MANIFEST}; "
            "one is written by `hrm-text data duplicates` or `hrm-text data contamination`"
        )
    status = path.stat()
    return _read_manifest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read_manifest(path: Path, mtime_ns: int, size: int) -> dict[str, Any]:
    # Remembered: a store has thousands of folders, and each asks for its own line.
    manifest = read_json(path)
    folders = manifest.get("folders") if isinstance(manifest, dict) else None
    if not isinstance(folders, dict) or not all(
        isinstance(noted, dict) and isinstance(noted.get("identity"), dict) for noted in folders.values()
    ):
        raise UserError(f"{path}: expected an object whose folders have an identity each; make the mask again")
    return dict(manifest)


class MaskWriter:
    """Takes the masks of a store's folders one by one."""

    def __init__(self, beside: Path) -> None:
        """Write into the folder ``beside``."""
        self.beside = beside
        self._folders: dict[str, dict[str, Any]] = {}

    def add(
        self,
        name: str,
        identity: Mapping[str, Any],
        mask: npt.NDArray[np.bool_],
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """The mask of the folder ``name``, [rows], and what else is to be counted of it."""
        assert identity["rows"] == len(mask)
        np.save(self.beside / f"{name}.npy", mask)
        self._folders[name] = {"identity": dict(identity), "masked": int(mask.sum()), **(counts or {})}

    def finish(self, kind: str, settings: Mapping[str, Any], report: Mapping[str, Any]) -> None:
        """Note what made the masks and what was found."""
        manifest = {"kind": kind, "settings": dict(settings), "report": dict(report), "folders": self._folders}
        write_json(self.beside / MASK_MANIFEST, manifest)


def finished_manifest(
    out: Path, kind: str, settings: Mapping[str, Any], identities: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The ``mask.json`` of masks that may stay as they are: of this kind, settings and store. None otherwise."""
    if not (out / MASK_MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    same_store = {name: noted["identity"] for name, noted in manifest["folders"].items()} == identities
    same = same_store and manifest.get("kind") == kind and manifest.get("settings") == settings
    return manifest if same and all((out / f"{name}.npy").is_file() for name in identities) else None


@contextmanager
def write_masks(out: Path) -> Iterator[MaskWriter]:
    """Write a folder of masks, whole or not at all; an older one there is replaced.

    Raises:
        UserError: ``out`` holds something else.
    """
    refuse_other_content(out)
    with whole_folder(out) as beside:
        yield MaskWriter(beside)


def refuse_other_content(out: Path) -> None:
    """A folder is replaced only where it holds nothing but masks.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder or nothing; choose another place")
    names = sorted(path.name for path in out.iterdir())
    others = [name for name in names if name not in (MASK_MANIFEST, COVERAGE) and not name.endswith(".npy")]
    if others or (names and MASK_MANIFEST not in names):
        raise UserError(f"{out}: is no folder of masks, it holds {(others or names)[0]}; choose another place")


def folder_identity(folder: Path) -> dict[str, Any]:
    """What tells one state of a store's folder from another, without reading all of its tokens.

    The index arrays whole (32 bytes a row), 16 blocks of tokens, and the checksums of source and tokenizer where
    ``metadata.json`` has them: a store of the published pipeline has not.

    Raises:
        UserError: an array is missing or damaged.
    """
    columns = [read_integers(folder / f"{name}.npy") for name in SPANS]
    tokens = read_integers(folder / "tokens.npy")
    digest = hashlib.sha256()
    for column in columns:
        for start in range(0, len(column), _HASH_ROWS):
            digest.update(column[start : start + _HASH_ROWS].astype("<u8").tobytes())
    for start in np.linspace(0, max(len(tokens) - _BLOCK_TOKENS, 0), _BLOCKS).astype(np.int64):
        digest.update(tokens[start : start + _BLOCK_TOKENS].astype("<u8").tobytes())
    path = folder / "metadata.json"
    metadata = read_json(path) if path.is_file() else {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: expected an object; tokenise its source again")
    return {
        "rows": len(columns[0]),
        "tokens": len(tokens),
        "sha256": digest.hexdigest(),
        "source_sha256": metadata.get("source_sha256"),
        "tokenizer_sha256": metadata.get("tokenizer_sha256"),
    }
