"""The mixture of the GPU preset: every source's files on disk, training and held-out records apart."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from hrm_text.contracts import UserError
from hrm_text.data.procedural import is_held_out
from hrm_text.data.sources.registry import SOURCES, Keyed, find_source, known_source
from hrm_text.files import read_json, whole_file, write_json

EXHAUSTED = 2000
"""After so many examples in a row that were seen before, a generator is taken to have no others."""

HELD_OUT = 200
"""Held-out problems of each file, all different, at most."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """What one file of the mixture holds and how it was made."""

    source: str
    file: str
    seed: int
    wanted: int
    examples: int
    """At most ``wanted``; fewer where the source has fewer that differ."""
    held_out: int
    characters: int
    """Of the instructions and responses of the training examples."""
    seconds: float


def build_gpu_mixture(
    out: Path,
    seed: int = 0,
    *,
    scale: float = 1.0,
    workers: int = 2,
    sources: Sequence[str] | None = None,
    on_progress: Callable[[FileReport, int, int], None] = lambda report, done, total: None,
) -> list[FileReport]:
    """Write the files of the sources, each whole or not at all; finished ones with the same settings are kept.

    ``out/train/<source>/<file>.jsonl`` holds the training records, ``out/held_out/<source>/<file>.jsonl`` those kept
    out (with the fields ``task`` and ``answer`` besides), ``out/reports/<source>/<file>.json`` what was made.

    Args:
        out: the folder.
        seed: the same seed gives the same files, whatever the number of workers.
        scale: factor on the examples of every file.
        workers: processes.
        sources: names, or None for all.
        on_progress: called after every file with its report, the files done and the files in all.

    Raises:
        UserError: an unknown source, or one that needs something to be installed; before anything is written.
    """
    if scale <= 0 or workers < 1:
        raise UserError(f"scale {scale} and workers {workers}: expected a scale above 0 and at least one worker")
    names = SOURCES if sources is None else sources
    jobs = [
        (found.name, file, max(1, round(scale * wanted)))
        for found in map(known_source, names)
        for file, wanted in found.files.items()
    ]
    reports: list[FileReport] = []
    waiting = []
    for job in jobs:
        report = _finished(*job, seed, out)
        if report is None:
            waiting.append(job)
        else:
            reports.append(report)
            on_progress(report, len(reports), len(jobs))
    missing = []
    for name in dict.fromkeys(job[0] for job in waiting):  # files that are there need nothing installed
        try:
            find_source(name)
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("\n".join(missing))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_build_file, *job, seed, out) for job in waiting]
        try:
            for future in as_completed(futures):
                reports.append(future.result())
                on_progress(reports[-1], len(reports), len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(reports, key=lambda report: jobs.index((report.source, report.file, report.wanted)))


def _report_path(out: Path, source: str, file: str) -> Path:
    return out / "reports" / source / f"{file}.json"


def _finished(source: str, file: str, wanted: int, seed: int, out: Path) -> FileReport | None:
    path = _report_path(out, source, file)
    if not path.exists():
        return None
    report = FileReport(**read_json(path))
    return report if (report.wanted, report.seed) == (wanted, seed) else None


def _build_file(source: str, file: str, wanted: int, seed: int, out: Path) -> FileReport:
    """Make one file; its report is written last and marks it finished."""
    start = time.perf_counter()
    train, kept_out = divide(find_source(source).generate(file, seed), wanted, HELD_OUT)
    _write(out / "held_out" / source / f"{file}.jsonl", [_held_out_record(keyed) for keyed in kept_out])
    _write(out / "train" / source / f"{file}.jsonl", [asdict(keyed.example) for keyed in train])
    characters = sum(len(keyed.example.instruction) + len(keyed.example.response) for keyed in train)
    seconds = round(time.perf_counter() - start, 2)
    report = FileReport(source, file, seed, wanted, len(train), len(kept_out), characters, seconds)
    write_json(_report_path(out, source, file), asdict(report))
    return report


def divide(examples: Iterable[Keyed], wanted: int, held_out: int) -> tuple[list[Keyed], list[Keyed]]:
    """The first ``wanted`` different training examples and the first ``held_out`` held-out problems met on the way.

    It ends early where the examples end or only repeat themselves.
    """
    train: list[Keyed] = []
    kept_out: dict[str, Keyed] = {}
    seen: set[tuple[str, str]] = set()
    repeats = 0
    for keyed in examples:
        asked = keyed.example.condition, keyed.example.instruction
        if asked in seen:
            repeats += 1
            if repeats == EXHAUSTED:
                break
            continue
        repeats = 0
        seen.add(asked)
        if is_held_out(keyed.task, keyed.key):
            if len(kept_out) < held_out:
                kept_out.setdefault(keyed.key, keyed)
        else:
            train.append(keyed)
            if len(train) == wanted:
                break
    return train, list(kept_out.values())


def read_held_out(path: Path) -> list[dict[str, str]]:
    """The records of a held-out file: condition, instruction, response, task and answer.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}); delete it and its report, and make it again") from None


def _held_out_record(keyed: Keyed) -> dict[str, str]:
    return {**asdict(keyed.example), "task": keyed.task, "answer": keyed.answer}


def _write(path: Path, records: list[dict[str, str]]) -> None:
    with whole_file(path) as beside, beside.open("wb") as lines:
        lines.writelines(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)
