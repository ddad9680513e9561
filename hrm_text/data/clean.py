"""Cleaning: public datasets, from local files or the hub, become files of records. Run again, it goes on where it was.

    RECORDS/<dataset>/<upstream path>.parquet   the records of one upstream file: condition, instruction, response
    RECORDS/<dataset>/<task>.parquet            where a dataset has strata: those of one task, from all its files
    RECORDS/<dataset>/.reports/                 for every upstream file: its identity, and what became of its rows
    RECORDS/<dataset>/.parts/, .strata/         what has yet to be gathered by task (``strata``), and what was

Every file is whole or absent. It is made again when its source, the cleaner's code or the filters have changed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from hrm_text.contracts import Example, UserError
from hrm_text.data.clean_plan import digest, find_sources, make_shards
from hrm_text.data.cleaner import CleanSettings, CleanShard, Tally, clean_rows
from hrm_text.data.engine import Engine, Progress
from hrm_text.data.records import ENDINGS, FIELDS
from hrm_text.data.sources import custom
from hrm_text.data.sources.upstream import DATASETS, Dataset, find_dataset
from hrm_text.data.strata import OPEN_FILES, RECORD_SCHEMA, bucket_of, gather, record_writer, spill
from hrm_text.files import is_alive, read_json, whole_file, write_json

_BATCH_ROWS = 1 << 16
_BATCH_CHARACTERS = 32 << 20


@dataclass(frozen=True, slots=True)
class CleanReport:
    """What became of a dataset."""

    dataset: str
    sources: int
    """Upstream files, folders of one-row files, or shards on the hub."""
    reused: int
    """Of them: cleaned before, and as they should be."""
    files: int
    """Of records."""
    tally: Tally


@dataclass(slots=True)
class _Plan:
    """What is to be done for a dataset."""

    found: Dataset
    shards: list[CleanShard]
    waiting: list[CleanShard] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.shards[0].out

    @property
    def has_strata(self) -> bool:
        return self.found.stratum is not None

    @property
    def stamp(self) -> str:
        """What the strata were gathered from."""
        return digest([(shard.name, dict(shard.stamp)) for shard in self.shards])


def mixture_names() -> list[str]:
    """The datasets of the mixture, in the order of their registration: all that come with this package, bar readers."""
    return [
        name
        for name, found in DATASETS.items()
        if found.group != custom.GROUP and found.clean.__module__.startswith("hrm_text.")
    ]


def clean_datasets(
    names: Sequence[str],
    out: Path,
    folder: Path | None = None,
    settings: CleanSettings | None = None,
    engine: Engine | None = None,
    on_progress: Progress | None = None,
) -> list[CleanReport]:
    """Clean datasets into ``out/<dataset>/``; what was cleaned before from the same source in the same way is kept.

    Memory is bounded in every worker by ``strata.RUN_CHARACTERS`` and a gathered bucket (``strata.OPEN_FILES``); here,
    by the reports of one dataset and the names of the upstream files, of which a large mixture has tens of thousands.

    Args:
        names: of datasets.
        out: folder for the records.
        folder: where the upstream files are, ``folder/<dataset>/`` or, for a single dataset, also ``folder`` itself;
            None reads from the hub.
        settings: filters and files of your own.
        engine: who works; this process without one.
        on_progress: bytes of source done, and in all (shards, on the hub); then the same for gathering tasks.

    Raises:
        UserError: an unknown dataset, filter or file, nothing to read, or records of something else in the way.
    """
    settings, engine = settings or CleanSettings(), engine or Engine()
    custom.load_sources(settings.sources)
    plans = [
        _Plan(found, make_shards(found, out / found.name, source, settings))
        for found, source in find_sources([find_dataset(name) for name in dict.fromkeys(names)], folder)
    ]
    for plan in plans:
        _refuse_foreign_records(plan)
        _sweep(plan.out)
        if not (plan.has_strata and _is_gathered(plan)):
            plan.waiting = [shard for shard in plan.shards if not _is_finished(shard)]
    waiting = [shard for plan in plans for shard in plan.waiting]
    engine.run("clean", clean_shard, waiting, weights=[shard.bytes for shard in waiting], on_progress=on_progress)
    _gather([plan for plan in plans if plan.has_strata], engine, on_progress)
    return [_report(plan) for plan in plans]


def clean_shard(shard: CleanShard) -> None:
    """Clean one shard into its file of records or, where the dataset has strata, into its part; then write its report.

    Raises:
        UserError: the source cannot be read, or the disk is full.
    """
    # The report of another run goes first: it must not outlive what it is about.
    shard.report.unlink(missing_ok=True)
    custom.load_sources(shard.settings.sources)  # this may be another process than the command's
    found, tally = find_dataset(shard.dataset), Tally()
    cleaned = clean_rows(shard, found, tally)
    about: dict[str, Any] = {"stamp": shard.stamp}
    if found.stratum is not None:
        index = spill(shard.part, cleaned)
        about |= {"written": shard.part.stat().st_size, "buckets": index.buckets, "files": index.files}
    else:
        about["written"] = _write_records(shard.records, (example for _, example in cleaned))
    write_json(shard.report, about | tally.as_dict())


def _write_records(path: Path, examples: Iterator[Example]) -> int:
    """Write a file of records, whole or not at all, and return its bytes; none where there is no record."""
    first = next(examples, None)
    if first is None:
        path.unlink(missing_ok=True)
        return 0
    with whole_file(path) as beside, record_writer(beside) as writer:
        for batch in _batches(chain([first], examples)):
            columns = [pa.array([getattr(example, name) for example in batch], pa.string()) for name in FIELDS]
            writer.write_batch(pa.record_batch(columns, schema=RECORD_SCHEMA))
    return path.stat().st_size


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += len(example.instruction) + len(example.response)
        if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_finished(shard: CleanShard) -> bool:
    about = _read_about(shard.report)
    if about.get("stamp") != shard.stamp:
        return False
    output = shard.part if "buckets" in about else shard.records
    return about["written"] == 0 or _size(output) == about["written"]


def _read_about(path: Path) -> dict[str, Any]:
    """What a file says of an earlier run; nothing where there is none."""
    if not path.exists():
        return {}
    about: dict[str, Any] = read_json(path)
    return about


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


@dataclass(frozen=True, slots=True)
class GatherShard:
    """Some tasks of one bucket: what one worker gathers at a time."""

    out: Path
    number: int
    files: tuple[str, ...]
    parts: tuple[str, ...]
    """Names of the cleaned shards, in order."""
    stamp: str

    @property
    def report(self) -> Path:
        return self.out / ".strata" / "gathered" / f"{self.number}.json"


def _is_gathered(plan: _Plan) -> bool:
    done = _read_about(plan.out / ".strata" / "done.json")
    return done.get("stamp") == plan.stamp and _are_there(plan.out, done["files"])


def _are_there(out: Path, files: Mapping[str, int]) -> bool:
    return all(_size(out / file) == size for file, size in files.items())


def _known_files(out: Path) -> list[str]:
    """The tasks' files that this or an earlier run made, or was about to make."""
    return list(_read_about(out / ".strata" / "files.json").get("files", ()))


def _gather(plans: Sequence[_Plan], engine: Engine, on_progress: Progress | None) -> None:
    """Gather the tasks of every dataset with strata that is not gathered yet, then remove the parts."""
    shards: list[GatherShard] = []
    weights: list[int] = []
    files_of: dict[str, list[str]] = {}
    for plan in plans:
        if _is_gathered(plan):
            continue
        reports = [read_json(shard.report) for shard in plan.shards]
        files = sorted({file for report in reports for file in report["files"]})
        files_of[plan.found.name] = files
        (plan.out / ".strata" / "done.json").unlink(missing_ok=True)
        write_json(plan.out / ".strata" / "files.json", {"files": sorted({*files, *_known_files(plan.out)})})
        groups = list(_groups(files))
        parts = tuple(shard.name for shard in plan.shards)
        size = sum(report["written"] for report in reports)
        for number, group in enumerate(groups):
            shard = GatherShard(plan.out, number, group, parts, plan.stamp)
            about = _read_about(shard.report)
            if about.get("stamp") != plan.stamp or not _are_there(plan.out, about["files"]):
                shards.append(shard)
                weights.append(size // len(groups))
    engine.run("gather", gather_shard, shards, weights=weights, on_progress=on_progress)
    for plan in plans:
        strata = plan.out / ".strata"
        if plan.found.name in files_of:
            files = files_of[plan.found.name]
            for file in set(_known_files(plan.out)) - set(files):  # tasks of an earlier run that are no more
                (plan.out / file).unlink(missing_ok=True)
            write_json(strata / "files.json", {"files": files})
            sizes = {file: _size(plan.out / file) for file in files}
            write_json(strata / "done.json", {"stamp": plan.stamp, "files": sizes})
        shutil.rmtree(plan.out / ".parts", ignore_errors=True)
        shutil.rmtree(strata / "gathered", ignore_errors=True)


def _groups(files: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Files of one bucket, so many at a time as may be open."""
    buckets: dict[int, list[str]] = {}
    for file in files:
        buckets.setdefault(bucket_of(file), []).append(file)
    for _, group in sorted(buckets.items()):
        for start in range(0, len(group), OPEN_FILES):
            yield tuple(group[start : start + OPEN_FILES])


def gather_shard(shard: GatherShard) -> None:
    """Gather some tasks from all parts, then write a note of it."""
    shard.report.unlink(missing_ok=True)
    parts = [
        (shard.out / ".parts" / f"{name}.arrow", read_json(shard.out / ".reports" / f"{name}.json")["buckets"])
        for name in shard.parts
    ]
    gather(shard.out, shard.files, parts)
    sizes = {file: _size(shard.out / file) for file in shard.files}
    write_json(shard.report, {"stamp": shard.stamp, "files": sizes})


def _refuse_foreign_records(plan: _Plan) -> None:
    """Whatever lies in the folder is tokenised and sampled: records of something else must not be among it."""
    ours = {shard.records for shard in plan.shards}
    if plan.has_strata:
        ours = {plan.out / file for file in _known_files(plan.out)}
    for ending in ENDINGS:
        for path in sorted(plan.out.rglob(f"*{ending}")):
            hidden = any(part.startswith(".") for part in path.relative_to(plan.out).parts)
            if path not in ours and not hidden:
                raise UserError(
                    f"{path}: records that come from none of the files that are to be cleaned now, but would be used "
                    "along with theirs; delete or move it, or choose another --out"
                )


_BESIDE = re.compile(r"\..+\.(\d+)\.tmp")


def _sweep(folder: Path) -> None:
    """Remove what processes left behind that were killed while they wrote."""
    for path in folder.rglob(".*.tmp"):
        match = _BESIDE.fullmatch(path.name)
        if match and not is_alive(int(match[1])):
            path.unlink(missing_ok=True)


def _report(plan: _Plan) -> CleanReport:
    tally = Tally()
    files = 0
    for shard in plan.shards:
        about = read_json(shard.report)
        tally.add(Tally.from_dict(about))
        files += about["written"] > 0
    if plan.has_strata:
        files = len(_known_files(plan.out))
    return CleanReport(plan.found.name, len(plan.shards), len(plan.shards) - len(plan.waiting), files, tally)
