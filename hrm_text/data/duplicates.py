"""Duplicate records of a token store, exact and near, inside a source file and across files, as masks.

Records are hashed shard by shard (``minhash``): 128 bits of the whole record, and 14 bands of MinHash values. Two
records that agree in the 128 bits or in a band are a pair; pairs join into groups; the first record of a group, in the
order of folders and rows, stays, and the others are masked. A pair is not looked at again, so what counts as near is
the curve in ``minhash``, and a chain of pairs may join records that are less alike than any two neighbours of it.

Nothing but the groups is held whole in memory. For 600 million documents:

    hashed shards   on disk   20 bytes a document of 128 bits, 12 of each band: 12 GB + 101 GB, less what is equal
                    memory    1.3 GB a worker (measured): 2^20 documents at a time
    partitions      on disk   8 bytes a pair
                    memory    about 0.6 GB a worker: 2^23 keys at a time, those whose first bits are the same
    groups          memory    4 bytes a document for the groups and 1 for what is exact: 3.0 GB, once

A key that many records share costs no more than one entry a shard, as a shard keeps its first record alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data import shards as store_shards
from hrm_text.data.engine import Engine, Progress
from hrm_text.data.masks import finished_manifest, refuse_other_content, write_masks
from hrm_text.data.minhash import Bands, Groups, hash_records, join_equal
from hrm_text.data.shards import Shard, StoreIndex, index_store, open_work_folder, read_rows, run_stage
from hrm_text.data.storage import read_integers
from hrm_text.files import whole_file, whole_folder
from hrm_text.settings import to_mapping

Kind = Literal["exact", "near"]
_KEYS: Mapping[Kind, tuple[str, ...]] = {"exact": ("first_half", "second_half"), "near": ("band",)}
_PARTITION_KEYS = 1 << 23
_CHUNK_PAIRS = 1 << 22
_HASH_TOKENS = 1 << 24
_TOP_SOURCES = 20
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class DuplicatesReport:
    """How many rows of a store are masked as duplicates."""

    rows: int
    """Of the store. Of these are masked:"""
    exact_inside: int
    """equal to an earlier row, and the row that stays is in the same source file;"""
    exact_across: int
    """the same, but the row that stays is in another file;"""
    near_inside: int
    """not equal, but in a group with a row of the same file that stays;"""
    near_across: int
    """the same, but the row that stays is in another file."""
    sources: list[dict[str, Any]]
    """The 20 pairs of files with most masked rows: kept, left_out, rows."""
    examples: list[dict[str, Any]]
    """The first few of each kind: kind, and kept and left_out as [file, row]."""

    @property
    def masked(self) -> int:
        return self.exact_inside + self.exact_across + self.near_inside + self.near_across


def find_duplicates(
    store: Path,
    out: Path,
    bands: Bands | None,
    engine: Engine,
    *,
    on_progress: Progress | None = None,
) -> DuplicatesReport:
    """Mask the duplicates of a token store. The same store and bands give the same bytes, with any engine.

    Run again after a kill, it goes on from the shards that are finished, which lie in ``OUT.work`` until the masks do.

    Args:
        store: a finished token store.
        out: folder for the masks; masks that are there already, of the same store and settings, are kept.
        bands: of MinHash; None looks for exact duplicates alone.
        engine: where the shards are worked on.
        on_progress: tokens hashed, and in all; finding pairs counts as a tenth as many again.

    Raises:
        UserError: no finished store, a damaged one, too many rows, or ``out`` holds something else.
    """
    refuse_other_content(out)
    index = index_store(store, store_shards.SHARD_ROWS, store_shards.SHARD_TOKENS)
    if index.rows >= 1 << 32:
        raise UserError(f"{store}: has {index.rows:,} rows, at most {(1 << 32) - 1:,} can be compared; split the store")
    settings = {"near": None if bands is None else to_mapping(bands)}
    finished = finished_manifest(out, "duplicates", settings, index.identity_of)
    if finished is not None:
        return DuplicatesReport(**finished["report"])

    kinds: tuple[Kind, ...] = ("exact",) if bands is None else ("exact", "near")
    work = open_work_folder(out, {"kind": "duplicates", "settings": settings}, index)
    hashed, paired = work / "hashed", work / "paired"
    pairing_weight = index.tokens // 10
    total = sum(shard.tokens for shard in index.shards) + pairing_weight

    def after_hashing(done: int, all_: int) -> None:
        if on_progress is not None:
            on_progress(total - pairing_weight + pairing_weight * done // max(1, all_), total)

    run_stage(
        engine, work, "hash", partial(_hash_shard, hashed, bands), index.shards,
        lambda shard: hashed / f"{shard.number:06}", lambda shard: shard.tokens,
        None if on_progress is None else lambda done, _: on_progress(done, total),
    )  # fmt: skip
    partitions = [
        Partition(kind, number, bits, len(index.shards))
        for kind in kinds
        for bits in [_partition_bits(index.rows * (bands.bands if bands and kind == "near" else 1))]
        for number in range(1 << bits)
    ]
    run_stage(
        engine, work, "pair", partial(_pair_partition, hashed, paired), partitions,
        lambda partition: paired / partition.file, lambda _: 1, after_hashing,
    )  # fmt: skip
    report = _write_masks(out, settings, index, kinds, hashed, paired)
    shutil.rmtree(work)
    return report


def _partition_bits(keys: int) -> int:
    return max(0, (keys - 1) // _PARTITION_KEYS).bit_length()


def _hash_shard(hashed: Path, bands: Bands | None, shard: Shard) -> None:
    """Write the keys of a shard's records, sorted, the first record of each; and the pairs of equal keys."""
    wholes, keys = [], []
    for run in shard.runs:
        rows = read_rows(run)
        hashes = hash_records(rows.tokens, rows.spans, bands)
        wholes.append(hashes.whole)
        keys.append(hashes.bands)
    whole, band_keys = np.concatenate(wholes), np.concatenate(keys)
    numbers = np.arange(shard.first_row, shard.first_row + len(whole), dtype=np.uint32)
    with whole_folder(hashed / f"{shard.number:06}") as beside:
        columns: dict[Kind, list[npt.NDArray[np.uint64]]] = {"exact": [whole[:, 0], whole[:, 1]]}
        if bands is not None:
            columns["near"] = [band_keys.reshape(-1)]
        for kind, of_kind in columns.items():
            of_keys = np.repeat(numbers, len(of_kind[0]) // max(1, len(numbers)))
            unique, firsts, pairs = join_equal(of_kind, of_keys)
            for name, column in zip(_KEYS[kind], unique, strict=True):
                np.save(beside / f"{name}.npy", column)
            np.save(beside / f"{kind}_firsts.npy", firsts)
            np.save(beside / f"{kind}_pairs.npy", pairs)


@dataclass(frozen=True, slots=True)
class Partition:
    """The keys of one kind that start with the same bits."""

    kind: Kind
    number: int
    bits: int
    shards: int

    @property
    def file(self) -> str:
        return f"{self.kind}_{self.number:06}.npy"


def _pair_partition(hashed: Path, paired: Path, partition: Partition) -> None:
    """Write the pairs of equal keys of different shards."""
    columns: list[list[npt.NDArray[np.uint64]]] = [[] for _ in _KEYS[partition.kind]]
    numbers = []
    for shard in range(partition.shards):
        folder = hashed / f"{shard:06}"
        keys = [read_integers(folder / f"{name}.npy") for name in _KEYS[partition.kind]]
        first, last = (
            int(np.searchsorted(keys[0], np.uint64(bound << 64 - partition.bits)))
            if bound < 1 << partition.bits
            else len(keys[0])
            for bound in (partition.number, partition.number + 1)
        )
        for column, key in zip(columns, keys, strict=True):
            column.append(np.array(key[first:last], np.uint64))
        numbers.append(np.array(read_integers(folder / f"{partition.kind}_firsts.npy")[first:last], np.uint32))
    _, _, pairs = join_equal([np.concatenate(column) for column in columns], np.concatenate(numbers))
    with whole_file(paired / partition.file) as beside, beside.open("wb") as file:
        np.save(file, pairs)


def _read_pairs(kind: Kind, hashed: Path, paired: Path) -> Iterator[npt.NDArray[np.uint32]]:
    """All pairs of a kind, [N, 2], some at a time."""
    for path in (*sorted(hashed.glob(f"*/{kind}_pairs.npy")), *sorted(paired.glob(f"{kind}_*.npy"))):
        pairs = np.load(path, mmap_mode="r") if path.stat().st_size > 1 << 16 else np.load(path)
        for start in range(0, len(pairs), _CHUNK_PAIRS):
            yield np.array(pairs[start : start + _CHUNK_PAIRS], np.uint32)


def _write_masks(
    out: Path, settings: Mapping[str, Any], index: StoreIndex, kinds: Sequence[Kind], hashed: Path, paired: Path
) -> DuplicatesReport:
    groups = Groups(index.rows)
    is_exact = np.zeros(index.rows, np.bool_)
    for kind in kinds:
        for pairs in _read_pairs(kind, hashed, paired):
            groups.join(pairs)
            if kind == "exact":
                is_exact[pairs[:, 1]] = True
    firsts = groups.firsts()

    first_rows = index.first_rows
    counts = {"exact_inside": 0, "exact_across": 0, "near_inside": 0, "near_across": 0}
    sources: list[tuple[int, int, int]] = []
    examples: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in kinds}

    def named(row: int) -> list[Any]:
        source = int(np.searchsorted(first_rows, row, "right")) - 1
        return [index.folders[source].name, row - int(first_rows[source])]

    with write_masks(out) as masks:
        for source, (folder, identity) in enumerate(zip(index.folders, index.identities, strict=True)):
            start, stop = int(first_rows[source]), int(first_rows[source + 1])
            kept = firsts[start:stop]
            mask = kept != np.arange(start, stop, dtype=np.uint32)
            exact = is_exact[start:stop]
            inside = kept >= start
            of_folder = {
                "exact_inside": int((mask & exact & inside).sum()),
                "exact_across": int((mask & exact & ~inside).sum()),
                "near_inside": int((mask & ~exact & inside).sum()),
                "near_across": int((mask & ~exact & ~inside).sum()),
            }
            masks.add(folder.name, identity, mask, of_folder)
            for name, count in of_folder.items():
                counts[name] += count
            kept_sources = np.bincount(np.searchsorted(first_rows, kept[mask], "right") - 1)
            # Most rows first, then in the order of the folders; only so many are remembered.
            sources += [(-int(kept_sources[other]), int(other), source) for other in np.flatnonzero(kept_sources)]
            sources = nsmallest(_TOP_SOURCES, sources)
            for kind, of_kind in examples.items():
                chosen = np.flatnonzero(mask & (exact if kind == "exact" else ~exact))
                for row in chosen[: _EXAMPLES - len(of_kind)].tolist():
                    of_kind.append({"kind": kind, "kept": named(int(kept[row])), "left_out": [folder.name, row]})
        report = DuplicatesReport(
            rows=index.rows,
            **counts,
            sources=[
                {"kept": index.folders[kept_].name, "left_out": index.folders[left_out].name, "rows": -count}
                for count, kept_, left_out in sources
            ],
            examples=[example for of_kind in examples.values() for example in of_kind],
        )
        masks.finish("duplicates", settings, asdict(report))
    return report
