"""The numbers behind the data report: what a token store or a sampled folder holds, and what was left out on the way.

Index arrays are read through memory maps, a chunk at a time. What is kept does not grow with the rows: counts of
lengths (1 MiB each), a line per source file, and for repeats one range of rows at a time (0.4 GiB).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.data.engine import Progress
from hrm_text.data.inspect import is_sampled
from hrm_text.data.left_out import CleaningStats, MaskStats, positive_counts, read_cleaning, read_mask_stats
from hrm_text.data.pack import EpochIndex, read_epoch
from hrm_text.data.packing_plan import PackingMeasures, packing_report, plan_epoch
from hrm_text.data.storage import read_integers
from hrm_text.data.tokenize import MANIFEST, store_folders
from hrm_text.files import read_json

Integers = npt.NDArray[np.int64]

CHUNK_ROWS = 1 << 22
PACKED_SAMPLES = 1 << 20
"""So many samples are as full as the whole epoch, for they come shuffled. Packing them takes 3 s on a core."""
_RANGE_ROWS = 1 << 23


class LengthCounts:
    """How many samples have which length; exact below ``LONGEST``, together from there on."""

    LONGEST = 1 << 17

    def __init__(self) -> None:
        """Start empty."""
        self.counts: Integers = np.zeros(self.LONGEST + 1, np.int64)
        """[LONGEST + 1]; the last counts what is as long or longer."""
        self.tokens = 0

    def add(self, lengths: Integers) -> None:
        """Count some lengths, [N]."""
        self.counts += np.bincount(np.minimum(lengths, self.LONGEST), minlength=self.LONGEST + 1)
        self.tokens += int(lengths.sum())

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> int:
        """The least length that ``share`` of the samples do not exceed; 0 without samples."""
        if not self.samples:
            return 0
        return int(np.searchsorted(np.cumsum(self.counts), share * self.samples, side="left"))

    def in_bins(self, edges: Integers) -> Integers:
        """[bins]; samples with a length from edges[i] to before edges[i + 1], edges [bins + 1]."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
        return np.diff(before[np.minimum(edges, len(self.counts))])


@dataclass(slots=True)
class SourceStats:
    """One source file."""

    name: str
    """Of its folder in the store."""
    rows: int = 0
    tokens: int = 0
    """Of the store, or drawn over all epochs, repeats included."""
    excluded: int = 0
    """Rows left out because of a mask,"""
    short_response: int = 0
    """because there is hardly a response,"""
    too_long: int = 0
    """and because the prefix fills the context."""
    truncated: int = 0
    """Rows whose response is cut to fit the context."""
    usable: int = 0
    drawn_rows: int = 0
    """Over all epochs, repeats included; 0 in a store."""

    @property
    def dataset(self) -> str:
        return dataset_of(self.name)

    @property
    def task(self) -> str:
        """The file, without its dataset and its ending."""
        rest = self.name.removeprefix(self.dataset).removeprefix("__")
        return re.sub(r"\.(jsonl|parquet)$", "", rest) or self.dataset


def dataset_of(name: str) -> str:
    """The dataset that a folder's name begins with: ``flan_cot_fs`` of ``flan_cot_fs__aqua.parquet``."""
    return re.sub(r"\.(jsonl|parquet)$", "", name.partition("__")[0])


@dataclass(frozen=True, slots=True)
class EpochStats:
    """One epoch of a sampled folder."""

    samples: int
    prefix_tokens: int
    response_tokens: int
    full: int
    """Samples that fill the context to the last token; nearly all of them were cut."""
    first_tokens: int
    """Tokens of samples that no epoch before and no row before in this epoch had."""
    earlier_tokens: int
    """Of samples that an earlier epoch had."""
    again_tokens: int
    """Of samples met before in this same epoch."""

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.response_tokens


@dataclass(frozen=True, slots=True)
class PackingStats:
    """How full the batches of the first epoch are."""

    tokens_per_batch: int
    ranks: int
    samples: int
    """Samples packed: the first of the epoch."""
    steps: int
    fullness: float
    """Share of the token budget that samples fill, without the last step."""
    least: float
    """Fullness of the emptiest batch, without the last step."""
    samples_per_batch: float
    fullness_counts: tuple[int, ...]
    """Batches by fullness, in 1,000 equal bins from 0 to 1."""
    measures: Mapping[str, PackingMeasures]
    """Of packing by tokens alone and of the plan that training follows; empty where less than a step is full."""


@dataclass(slots=True)
class CorpusStats:
    """Everything the report shows; what is unknown is empty."""

    path: Path
    is_store: bool
    max_seq_len: int
    sources: list[SourceStats] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    """Group of every dataset, as in the released mixture's table; a dataset that is not of it is its own group."""
    epochs: list[EpochStats] = field(default_factory=list)
    prefix_lengths: LengthCounts = field(default_factory=LengthCounts)
    response_lengths: LengthCounts = field(default_factory=LengthCounts)
    packing: PackingStats | None = None
    masks: list[MaskStats] = field(default_factory=list)
    cleaning: dict[str, CleaningStats] = field(default_factory=dict)
    """By dataset, of the reports of `hrm-text data clean`."""
    tokenizing: Counter[str] = field(default_factory=Counter)
    """Records left out when a store was written, by reason."""
    unreadable_reports: int = 0

    def by_group(self) -> dict[str, list[SourceStats]]:
        """The sources of every group, groups with most tokens first."""
        found: dict[str, list[SourceStats]] = {}
        for source in self.sources:
            found.setdefault(self.groups[source.dataset], []).append(source)
        return dict(sorted(found.items(), key=lambda item: -sum(source.tokens for source in item[1])))


def corpus_stats(
    path: Path,
    *,
    records: Path | None = None,
    masks: Sequence[Path] = (),
    tokens_per_batch: int = 12_288,
    ranks: int = 16,
    max_seq_len: int = 4097,
    on_progress: Progress | None = None,
) -> CorpusStats:
    """Count what lies in a token store or a sampled folder.

    Args:
        path: the store or the sampled folder.
        records: folder that `hrm-text data clean` wrote to, for what was kept and dropped.
        masks: folders that `hrm-text data duplicates` or `hrm-text data contamination` wrote.
        tokens_per_batch: of a micro-batch, for the packing of a sampled folder.
        ranks: micro-batches of a step.
        max_seq_len: of the sampling that a store is for; a sampled folder knows its own.
        on_progress: rows read, and in all.

    Raises:
        UserError: ``path`` is neither, or is damaged; no such folder of masks or records.
    """
    for name, value in (("tokens-per-batch", tokens_per_batch), ("ranks", ranks), ("max-seq-len", max_seq_len)):
        if value < 1:
            raise UserError(f"{name}: expected at least 1, found {value}")
    if (path / MANIFEST).is_file():
        stats = CorpusStats(path, is_store=True, max_seq_len=max_seq_len)
        _read_store(stats, on_progress)
    elif is_sampled(path):
        metadata = read_json(path / "metadata.json")
        longest = metadata.get("max_seq_len") if isinstance(metadata, dict) else None
        if not isinstance(longest, int):
            raise UserError(f"{path / 'metadata.json'}: expected a number under max_seq_len; sample the data again")
        stats = CorpusStats(path, is_store=False, max_seq_len=longest)
        _read_sampled(stats, tokens_per_batch, ranks, on_progress)
    else:
        raise UserError(
            f"{path}: expected a token store (with {MANIFEST}) or a sampled folder (with metadata.json and tokens)"
        )
    stats.masks = [read_mask_stats(folder) for folder in masks]
    if records is not None:
        stats.cleaning, stats.unreadable_reports = read_cleaning(records)
    groups = dataset_groups()
    stats.groups = {name: groups.get(name, name) for name in {source.dataset for source in stats.sources}}
    return stats


def dataset_groups() -> dict[str, str]:
    """The group of every public dataset that there is a cleaner for."""
    import hrm_text.data.sources  # noqa: F401  its modules register the datasets
    from hrm_text.data.sources.upstream import DATASETS

    return {dataset.name: dataset.group for dataset in DATASETS.values()}


def _chunks(folder: Path, names: Sequence[str]) -> Iterator[list[Integers]]:
    """Some index files side by side, CHUNK_ROWS rows at a time."""
    columns = [read_integers(folder / f"{name}.npy") for name in names]
    if len({len(column) for column in columns}) != 1:
        raise UserError(f"{folder}: its index files differ in length; write the folder again")
    for start in range(0, len(columns[0]), CHUNK_ROWS):
        chunk = [column[start : start + CHUNK_ROWS].astype(np.int64) for column in columns]
        if min(int(column.min()) for column in chunk) < 0:
            raise UserError(f"{folder}: an index file holds a number below 0; write the folder again")
        yield chunk


def _read_store(stats: CorpusStats, on_progress: Progress | None) -> None:
    folders = store_folders(stats.path)
    total = sum(len(read_integers(folder / "inst_len.npy")) for folder in folders)
    done = 0
    for folder in folders:
        source = SourceStats(folder.name)
        for inst_len, resp_len in _chunks(folder, ("inst_len", "resp_len")):
            stats.prefix_lengths.add(inst_len)
            stats.response_lengths.add(resp_len)
            short, too_long = resp_len < 2, inst_len >= stats.max_seq_len
            kept = ~short & ~too_long
            source.rows += len(inst_len)
            source.tokens += int(inst_len.sum() + resp_len.sum())
            source.short_response += int(short.sum())
            source.too_long += int((too_long & ~short).sum())
            source.truncated += int((kept & (inst_len + resp_len > stats.max_seq_len)).sum())
            source.usable += int(kept.sum())
            done += len(inst_len)
            if on_progress is not None:
                on_progress(done, total)
        stats.sources.append(source)
        if (folder / "metadata.json").is_file():
            metadata = read_json(folder / "metadata.json")
            stats.tokenizing.update(positive_counts(metadata.get("dropped") if isinstance(metadata, dict) else None))


def _read_sampled(stats: CorpusStats, tokens_per_batch: int, ranks: int, on_progress: Progress | None) -> None:
    names = [re.fullmatch(r"epoch_(\d+)", folder.name) for folder in stats.path.iterdir()]
    numbers = sorted(int(name[1]) for name in names if name)
    if not numbers:
        raise UserError(f"{stats.path}: no folder epoch_<n>; a sampled folder is made by `hrm-text data sample`")
    if (stats.path / "sampling.json").is_file():
        recorded = read_json(stats.path / "sampling.json")
        strata = recorded.get("strata") if isinstance(recorded, dict) else None
        for stratum in strata if isinstance(strata, list) else []:
            if isinstance(stratum, dict) and isinstance(stratum.get("name"), str):
                stats.sources.append(_stratum_stats(stratum))
    epochs = [read_epoch(stats.path, number) for number in numbers]
    total, done = 2 * sum(map(len, epochs)), 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if on_progress is not None:
            on_progress(min(done, total), total)

    full, tokens = [], []
    for number in numbers:
        of_epoch, prefix_tokens, response_tokens = 0, 0, 0
        for inst_len, resp_len in _chunks(stats.path / f"epoch_{number}", ("inst_len", "resp_len")):
            stats.prefix_lengths.add(inst_len)
            stats.response_lengths.add(resp_len)
            of_epoch += int((inst_len + resp_len >= stats.max_seq_len).sum())
            prefix_tokens += int(inst_len.sum())
            response_tokens += int(resp_len.sum())
            advance(len(inst_len))
        full.append(of_epoch)
        tokens.append((prefix_tokens, response_tokens))
    repeats = count_repeats(epochs, advance)
    for index, of_epoch, (prefix_tokens, response_tokens), kinds in zip(epochs, full, tokens, repeats, strict=True):
        stats.epochs.append(EpochStats(len(index), prefix_tokens, response_tokens, of_epoch, *map(int, kinds)))
    if len(epochs[0]):
        stats.packing = packing_stats(epochs[0][slice(PACKED_SAMPLES)], tokens_per_batch, ranks)


def _stratum_stats(stratum: Mapping[str, Any]) -> SourceStats:
    def count(key: str) -> int:
        value = stratum.get(key, 0)
        return value if isinstance(value, int) else 0

    return SourceStats(
        name=stratum["name"],
        rows=count("rows"),
        tokens=count("drawn_tokens"),
        excluded=count("excluded"),
        short_response=count("short_response"),
        too_long=count("too_long"),
        truncated=count("truncated"),
        usable=count("usable"),
        drawn_rows=count("drawn_rows"),
    )


def count_repeats(
    epochs: Sequence[EpochIndex], on_rows: Callable[[int], None] = lambda rows: None, range_rows: int = _RANGE_ROWS
) -> Integers:
    """Tokens by whether their sample was met before: [epochs, 3], as first, in an earlier epoch, again in this one.

    A sample is known by where its response starts. The token file is gone through in ranges that hold about
    ``range_rows`` rows of all epochs; every range reads the index of every epoch, but keeps its own rows alone.
    """
    found = np.zeros((len(epochs), 3), np.int64)
    longest = max((int(index.resp_start.max()) for index in epochs if len(index)), default=0)
    width = longest // (1 << 16) + 1
    in_cell = np.zeros((1 << 16) + 1, np.int64)
    for index in epochs:
        for start in range(0, len(index), CHUNK_ROWS):
            in_cell += np.bincount(index.resp_start[start : start + CHUNK_ROWS] // width, minlength=len(in_cell))
    # A range ends where the rows up to here pass the next multiple of range_rows.
    multiples = np.cumsum(in_cell) // range_rows
    cuts = [0, *(np.flatnonzero(np.diff(multiples)) + 1), len(in_cell)]
    for low, high in pairwise(cuts):
        starts, lengths, of_epoch = [], [], []
        for number, index in enumerate(epochs):
            for start in range(0, len(index), CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                cell = index.resp_start[rows] // width
                mine = np.flatnonzero((cell >= low) & (cell < high))
                starts.append(index.resp_start[rows][mine])
                lengths.append((index.inst_len[rows][mine] + index.resp_len[rows][mine]).astype(np.int64))
                of_epoch.append(np.full(len(mine), number, np.int16))
                on_rows(len(mine))
        if starts:
            found += _kinds(np.concatenate(starts), np.concatenate(lengths), np.concatenate(of_epoch), len(epochs))
    return found


def _kinds(starts: Integers, lengths: Integers, of_epoch: npt.NDArray[np.int16], epochs: int) -> Integers:
    order = np.argsort(starts, kind="stable")  # of equal starts the earlier epoch stays first
    starts, lengths, of_epoch = starts[order], lengths[order], of_epoch[order]
    met = np.zeros(len(starts), bool)
    met[1:] = starts[1:] == starts[:-1]
    same_epoch = np.zeros(len(starts), bool)
    same_epoch[1:] = met[1:] & (of_epoch[1:] == of_epoch[:-1])
    kinds = np.where(same_epoch, 2, np.where(met, 1, 0))
    # Weights are doubles: exact up to 2**53 tokens.
    counts = np.bincount(of_epoch.astype(np.int64) * 3 + kinds, weights=lengths, minlength=3 * epochs)
    return counts.astype(np.int64).reshape(epochs, 3)


def packing_stats(samples: EpochIndex, tokens_per_batch: int, ranks: int) -> PackingStats:
    """Pack some samples as training does, and see how full the batches are.

    Raises:
        UserError: a sample is longer than a batch.
    """
    lengths, prefix_lengths = samples.sample_lengths, np.asarray(samples.inst_len, np.int64)
    packing = plan_epoch(lengths, prefix_lengths, tokens_per_batch, ranks)
    in_batch = packing.sums(lengths).ravel()
    filled = in_batch / tokens_per_batch
    is_one_step = len(packing) == 1
    whole = filled if is_one_step else filled[:-ranks]  # the last step holds what is left
    return PackingStats(
        tokens_per_batch=tokens_per_batch,
        ranks=ranks,
        samples=len(lengths),
        steps=len(packing),
        fullness=float(whole.mean()),
        least=float(whole.min()),
        samples_per_batch=len(lengths) / len(filled),
        fullness_counts=tuple(np.histogram(whole, bins=1000, range=(0, 1))[0].tolist()),
        measures={} if is_one_step else packing_report(lengths, prefix_lengths, tokens_per_batch, ranks),
    )
