"""Which questions of the benchmarks stand in a token store, and which of its rows hold them, as masks.

The questions are tokenised as the store is, without the tokens of a prompt, and all their runs of n tokens are looked
for in the records (``ngrams``). The coverage of a question is the share of its tokens in runs that were found. At the
edges of a question a record may have other tokens, as it goes on there: a run that reaches the edge is then not found,
those inside are.

A row is masked if it holds a run of ``mask_n`` tokens of any question, unless that run stands in more than ``common``
records of the store: such a run is a phrase, not a question. Coverage counts those runs too.

The store is read once. In memory: the questions and their runs (``ngrams``), shared by the workers; of the store
nothing but the rows of a worker that are looked at, and, at the end, the mask of one folder at a time. On the disk,
until the masks are written: 8 bytes for every run in every row that holds it, of one run at most ``common`` a folder of
a shard.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from hrm_text.contracts import UserError
from hrm_text.data import shards as store_shards
from hrm_text.data.benchmarks import Question, read_benchmarks
from hrm_text.data.engine import Engine, Progress
from hrm_text.data.masks import COVERAGE, finished_manifest, refuse_other_content, write_masks
from hrm_text.data.ngrams import Matches, Ngrams, build_ngrams
from hrm_text.data.shards import Shard, StoreIndex, index_store, open_work_folder, read_rows, run_stage
from hrm_text.data.subsets import Subset, read_scores, subsets_of
from hrm_text.data.tokenize import MANIFEST
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_file
from hrm_text.files import read_json, sha256, whole_folder

LONGEST_N = 63
_SCAN_ROWS = 1 << 14
_TOP_SOURCES = 10
_ENCODE_TEXTS = 4096


@dataclass(frozen=True, slots=True)
class ContaminatedBenchmark:
    """What was found of one benchmark, for one n."""

    benchmark: str
    n: int
    questions: int
    too_short: int
    """Questions in which no run of n tokens fits; they are clean, whatever the corpus holds."""
    subsets: list[Subset]
    sources: list[dict[str, Any]]
    """The 10 files of the store that hold most of its runs: source, runs (different ones)."""


@dataclass(frozen=True, slots=True)
class ContaminationReport:
    """What was found in a store."""

    benchmarks: list[ContaminatedBenchmark]
    rows: int
    """Of the store."""
    masked: int
    """Rows."""
    common_runs: int
    """Runs of the n of the mask that were found, and are too common to mask a row."""

    def as_json(self) -> dict[str, Any]:
        """For machines: the report, and of each subset whether it is flagged."""
        value = asdict(self)
        for of_benchmark, found in zip(value["benchmarks"], self.benchmarks, strict=True):
            for of_subset, subset in zip(of_benchmark["subsets"], found.subsets, strict=True):
                of_subset["flagged"] = subset.flagged
        return value


@dataclass(frozen=True, slots=True)
class QuestionTokens:
    """The tokens of all questions: each question is some pieces, each piece a text of its own."""

    tokens: npt.NDArray[np.uint32]
    """[Q]"""
    piece_starts: npt.NDArray[np.int64]
    """[pieces + 1]"""
    question_starts: npt.NDArray[np.int64]
    """[questions + 1]; in tokens."""


@dataclass(frozen=True, slots=True)
class ScanSettings:
    """What is looked for, and where the tables of it lie."""

    tables: Path
    scanned: Path
    n: tuple[int, ...]
    mask_n: int
    common: int


def find_contamination(
    store: Path,
    benchmarks: Path,
    out: Path,
    engine: Engine,
    *,
    n: Sequence[int] = (13, 20),
    mask_n: int = 13,
    common: int = 1000,
    scores: Path | None = None,
    tokenizer: Path | None = None,
    on_progress: Progress | None = None,
) -> ContaminationReport:
    """Look for the questions of benchmarks in a token store, and mask the rows that hold them.

    The same store, questions and settings give the same bytes, with any engine. Run again after a kill, it goes on from
    the shards that are finished, which lie in ``OUT.work`` until the masks do; run again with other scores, it reads
    nothing but what it wrote.

    Args:
        store: a finished token store.
        benchmarks: folder of test sets, as for ``read_benchmarks``.
        out: folder for the masks.
        engine: where the shards are worked on.
        n: lengths of the runs, in tokens.
        mask_n: that of the mask, one of ``n``.
        common: a run in more records than these masks none of them.
        scores: of the questions, as for ``read_scores``; without it no score is tested.
        tokenizer: its folder, in case it is not where the store says.
        on_progress: tokens scanned, and in all.

    Raises:
        UserError: a setting out of range, no finished store, a tokenizer that is not the store's, no benchmark, bad
            scores, or ``out`` holds something else.
    """
    n = tuple(sorted(set(n)))
    if not n or n[0] < 1 or n[-1] > LONGEST_N:
        raise UserError(f"n: expected lengths from 1 to {LONGEST_N} tokens, found {', '.join(map(str, n)) or 'none'}")
    if mask_n not in n:
        raise UserError(f"mask_n is {mask_n}, expected one of n: {', '.join(map(str, n))}")
    if common < 1:
        raise UserError(f"common is {common}, expected at least 1 record")
    refuse_other_content(out)
    questions = read_benchmarks(benchmarks)
    scored = {} if scores is None else read_scores(scores, questions)
    index = index_store(store, store_shards.SHARD_ROWS, store_shards.SHARD_TOKENS)
    tokenised = _tokenise(questions, _tokenizer_of(index, tokenizer))
    settings = {
        "n": list(n),
        "mask_n": mask_n,
        "common": common,
        "questions": _counts(questions),
        "questions_sha256": _checksum(tokenised),
    }
    finished = finished_manifest(out, "contamination", settings, index.identity_of)
    if finished is not None and (out / COVERAGE).is_file():
        return _report(finished["report"], questions, _read_coverage(out / COVERAGE, n), scored)

    work = open_work_folder(out, {"kind": "contamination", "settings": settings}, index)
    tables, scanned = work / "tables", work / "scanned"
    if not tables.is_dir():
        with whole_folder(tables) as beside:
            for length in n:
                build_ngrams(tokenised.tokens, tokenised.piece_starts, length).save(beside)
    scan = ScanSettings(tables, scanned, n, mask_n, common)
    run_stage(
        engine, work, "scan", partial(_scan_shard, scan), index.shards,
        lambda shard: scanned / f"{shard.number:06}", lambda shard: shard.tokens, on_progress,
    )  # fmt: skip
    found, coverage = _write_masks(out, settings, index, scan, questions, tokenised)
    shutil.rmtree(work)
    return _report(found, questions, coverage, scored)


def _tokenizer_of(index: StoreIndex, given: Path | None) -> Any:
    """The tokenizer that a store was made with."""
    named = read_json(index.store / MANIFEST).get("tokenizer_path")
    if given is None and not isinstance(named, str):
        raise UserError(f"{index.store}: does not say which tokenizer it was made with; name one (--tokenizer)")
    folder = given or Path(str(named))
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{index.store}: was made with the tokenizer {folder}, which cannot be read: {error}") from None
    known = {identity["tokenizer_sha256"] for identity in index.identities} - {None}
    if known and sha256(tokenizer_file(folder)) not in known:
        raise UserError(
            f"{folder}: is not the tokenizer that {index.store} was made with; name that one (--tokenizer), "
            "or tokenise the store's sources again"
        )
    return tokenizer


def _tokenise(questions: Sequence[Question], tokenizer: Any) -> QuestionTokens:
    texts = [text for question in questions for text in question.texts]
    pieces: list[npt.NDArray[np.uint32]] = []
    for start in range(0, len(texts), _ENCODE_TEXTS):
        encodings = tokenizer.encode_batch_fast(texts[start : start + _ENCODE_TEXTS], add_special_tokens=False)
        pieces += [np.array(encoding.ids, np.uint32) for encoding in encodings]
    piece_starts = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
    first_pieces = np.cumsum([0] + [len(question.texts) for question in questions], dtype=np.int64)
    return QuestionTokens(np.concatenate(pieces), piece_starts, piece_starts[first_pieces])


def _counts(questions: Sequence[Question]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for question in questions:
        counts[question.benchmark] = counts.get(question.benchmark, 0) + 1
    return counts


def _checksum(tokenised: QuestionTokens) -> str:
    digest = hashlib.sha256()
    for array in (tokenised.tokens, tokenised.piece_starts, tokenised.question_starts):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _scan_shard(scan: ScanSettings, shard: Shard) -> None:
    """Write, for each run of rows, how many of them hold each run of tokens, and which hold one of the mask's."""
    tables = [Ngrams.load(scan.tables, n) for n in scan.n]
    with whole_folder(scan.scanned / f"{shard.number:06}") as beside:
        for number, run in enumerate(shard.runs):
            rows = read_rows(run)
            matches = Matches(tables, scan.mask_n, scan.common)
            pairs = [np.empty((0, 2), np.int32)]
            # The tokens of so many rows are still in memory when they are looked at for the next n.
            for start in range(0, len(rows.spans), _SCAN_ROWS):
                pairs += matches.scan(rows.tokens, rows.spans[start : start + _SCAN_ROWS])
            np.save(beside / f"{number}_pairs.npy", np.concatenate(pairs))
            for n, records in zip(scan.n, matches.records, strict=True):
                found = np.flatnonzero(records)
                np.save(beside / f"{number}_records_{n}.npy", np.stack((found, records[found]), axis=1))


def _scanned_runs(index: StoreIndex, scanned: Path) -> Iterator[tuple[int, int, int, str]]:
    """Of every run of rows: the number of its folder, its first and last row, and how the names of its files start."""
    for shard in index.shards:
        for number, run in enumerate(shard.runs):
            yield run.source, run.first, run.last, str(scanned / f"{shard.number:06}" / f"{number}_")


def _write_masks(
    out: Path,
    settings: Mapping[str, Any],
    index: StoreIndex,
    scan: ScanSettings,
    questions: Sequence[Question],
    tokenised: QuestionTokens,
) -> tuple[dict[str, Any], dict[int, npt.NDArray[np.float64]]]:
    """Write masks, coverage and what was found; returns what was found and the coverage for each n, [questions]."""
    bounds = _benchmark_bounds(questions)
    coverage, benchmarks, is_common = {}, [], np.empty(0, np.bool_)
    for n in scan.n:
        table = Ngrams.load(scan.tables, n)
        records = np.zeros(len(table.start_of), np.uint64)
        sources: dict[str, list[tuple[int, int]]] = {name: [] for name in bounds}
        members = {
            name: _runs_of(table, *tokenised.question_starts[[first, last]].tolist())
            for name, (first, last) in bounds.items()
        }
        for source, runs in _runs_by_source(index, scan.scanned, n, records):
            for name, of_benchmark in members.items():
                if count := int(of_benchmark[runs].sum()):
                    sources[name] = nsmallest(_TOP_SOURCES, [*sources[name], (-count, source)])
        coverage[n] = _coverage(table, records, tokenised.question_starts)
        fits = np.add.reduceat(np.append(table.run_at >= 0, False), tokenised.question_starts[:-1])
        fits[np.diff(tokenised.question_starts) == 0] = 0
        for name, (first, last) in bounds.items():
            too_short = int((fits[first:last] == 0).sum())
            of_sources = [{"source": index.folders[source].name, "runs": -count} for count, source in sources[name]]
            benchmarks.append({"benchmark": name, "n": n, "too_short": too_short, "sources": of_sources})
        if n == scan.mask_n:
            is_common = records > scan.common

    found: dict[str, Any] = {"benchmarks": benchmarks, "rows": index.rows, "common_runs": int(is_common.sum())}
    with write_masks(out) as masks:
        found["masked"] = 0
        of_folder = [np.zeros(0, np.bool_)] * len(index.folders)
        for source, first, last, start in _scanned_runs(index, scan.scanned):
            rows = index.identities[source]["rows"]
            mask = np.zeros(rows, np.bool_) if first == 0 else of_folder[source]
            pairs = np.load(f"{start}pairs.npy")
            mask[first + pairs[~is_common[pairs[:, 1]], 0]] = True
            of_folder[source] = mask
            if last == rows:
                masks.add(index.folders[source].name, index.identities[source], mask)
                found["masked"] += int(mask.sum())
                of_folder[source] = np.zeros(0, np.bool_)
        for folder, identity in zip(index.folders, index.identities, strict=True):
            if not identity["rows"]:
                masks.add(folder.name, identity, np.zeros(0, np.bool_))
        _write_coverage(masks.beside / COVERAGE, questions, tokenised, coverage)
        masks.finish("contamination", settings, found)
    return found, coverage


def _benchmark_bounds(questions: Sequence[Question]) -> dict[str, tuple[int, int]]:
    """The first question of each benchmark and the one after its last."""
    bounds, first = {}, 0
    for name, count in _counts(questions).items():
        bounds[name] = (first, first + count)
        first += count
    return bounds


def _runs_of(table: Ngrams, first: int, last: int) -> npt.NDArray[np.bool_]:
    """[G]; which runs stand between two positions."""
    member = np.zeros(len(table.start_of), np.bool_)
    runs = table.run_at[first:last]
    member[runs[runs >= 0]] = True
    return member


def _runs_by_source(
    index: StoreIndex, scanned: Path, n: int, records: npt.NDArray[np.uint64]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """The different runs found in each folder; adds up in ``records``, [G], in how many records each stands."""
    so_far: list[npt.NDArray[np.int64]] = []
    for source, _, last, start in _scanned_runs(index, scanned):
        found = np.load(f"{start}records_{n}.npy")
        records[found[:, 0]] += found[:, 1].astype(np.uint64)
        so_far.append(found[:, 0])
        if last == index.identities[source]["rows"]:
            yield source, np.unique(np.concatenate(so_far))
            so_far.clear()


def _coverage(
    table: Ngrams, records: npt.NDArray[np.uint64], question_starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """[questions]; the share of the tokens of each that stand in a run that was found."""
    run_at = np.asarray(table.run_at)
    starts = np.flatnonzero(run_at >= 0)
    starts = starts[records[run_at[starts]] > 0]
    change = np.zeros(len(run_at) + 1, np.int32)
    change[starts] += 1
    change[starts + table.n] -= 1
    covered = np.concatenate(([0], np.cumsum(np.cumsum(change[:-1]) > 0)))
    lengths = np.diff(question_starts)
    return (covered[question_starts[1:]] - covered[question_starts[:-1]]) / np.maximum(lengths, 1)


def _write_coverage(
    path: Path,
    questions: Sequence[Question],
    tokenised: QuestionTokens,
    coverage: Mapping[int, npt.NDArray[np.float64]],
) -> None:
    lengths = np.diff(tokenised.question_starts).tolist()
    with path.open("wb") as file:
        for number, question in enumerate(questions):
            value = {
                "benchmark": question.benchmark,
                "index": question.index,
                "id": question.number,
                "tokens": lengths[number],
                "coverage": {str(n): float(of_n[number]) for n, of_n in coverage.items()},
            }
            file.write(orjson.dumps(value) + b"\n")


def _read_coverage(path: Path, n: Sequence[int]) -> dict[int, npt.NDArray[np.float64]]:
    try:
        values = [orjson.loads(line)["coverage"] for line in path.read_bytes().splitlines()]
        return {length: np.array([value[str(length)] for value in values], np.float64) for length in n}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); remove {path.parent} and run this again") from None


def _report(
    found: Mapping[str, Any],
    questions: Sequence[Question],
    coverage: Mapping[int, npt.NDArray[np.float64]],
    scored: Mapping[str, npt.NDArray[np.float64]],
) -> ContaminationReport:
    bounds = _benchmark_bounds(questions)
    benchmarks = []
    for one in found["benchmarks"]:
        name, n = one["benchmark"], one["n"]
        first, last = bounds[name]
        subsets = subsets_of(coverage[n][first:last], scored.get(name))
        benchmarks.append(ContaminatedBenchmark(name, n, last - first, one["too_short"], subsets, list(one["sources"])))
    return ContaminationReport(benchmarks, found["rows"], found["masked"], found["common_runs"])
