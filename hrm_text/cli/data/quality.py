"""`hrm-text data duplicates | contamination`: which rows of a token store to leave out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from hrm_text.cli.terminal import print_json, progress_bar, tell
from hrm_text.data.engine import Kind

if TYPE_CHECKING:
    from hrm_text.data.contamination import ContaminationReport
    from hrm_text.data.duplicates import DuplicatesReport


def duplicates(
    store: Positional[Path],
    out: Path,
    near: bool = True,
    bands: int = 14,
    rows: int = 8,
    workers: int = 1,
    engine: Kind = "local",
    partition: str = "",
    json: bool = False,
) -> None:
    """Mask the duplicates of a token store, exact and near; the first of a group stays.

    Args:
        store: folder that `hrm-text data tokenize` wrote
        out: folder for the masks
        near: near duplicates too: records that share a band of MinHash values
        bands: of MinHash: more find less similar records
        rows: values in a band: more ask for more similar records
        workers: processes
        engine: where they run
        partition: of slurm
        json: print the report as JSON
    """
    from dataclasses import asdict

    from hrm_text.data.duplicates import find_duplicates
    from hrm_text.data.engine import Engine
    from hrm_text.data.minhash import Bands
    from hrm_text.settings import from_mapping

    settings = from_mapping(Bands, {"bands": bands, "rows": rows}, "duplicates") if near else None
    with progress_bar("looking for duplicates", "tokens") as on_progress:
        where = Engine(engine, workers, partition=partition)
        report = find_duplicates(store, out, settings, where, on_progress=on_progress)
    if json:
        print_json(asdict(report) | {"masked": report.masked})
    else:
        _show_duplicates(report)
    tell(f"wrote {out}: {report.masked:,} of {report.rows:,} rows masked. Next:")
    tell(f"  hrm-text data sample {store} --out SAMPLED --rules RULES.yaml --epochs 4 --exclude {out}")


def _show_duplicates(report: DuplicatesReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("duplicates", title="Rows left out, by where the first is", title_justify="left")
    for title in ("same file", "another file"):
        table.add_column(title, justify="right")
    table.add_row("exact", f"{report.exact_inside:,}", f"{report.exact_across:,}")
    table.add_row("near", f"{report.near_inside:,}", f"{report.near_across:,}")
    console.print(table)
    if report.sources:
        table = Table("stays in", "left out of", title="Files", title_justify="left")
        table.add_column("rows", justify="right")
        for pair in report.sources:
            table.add_row(Text(pair["kept"]), Text(pair["left_out"]), f"{pair['rows']:,}")
        console.print(table)
    for example in report.examples:
        (kept, kept_row), (left_out, row) = example["kept"], example["left_out"]
        line = f"{example['kind']}: {left_out} row {row} is left out for {kept} row {kept_row}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def contamination(
    store: Positional[Path],
    benchmarks: Path,
    out: Path,
    n: tuple[int, ...] = (13, 20),
    mask_n: int = 13,
    common: int = 1000,
    scores: Path | None = None,
    tokenizer: Path | None = None,
    workers: int = 1,
    engine: Kind = "local",
    partition: str = "",
    json: bool = False,
) -> None:
    """Look for the questions of benchmarks in a token store, and mask the rows that hold them.

    Args:
        store: folder that `hrm-text data tokenize` wrote
        benchmarks: folder of test sets, such as gsm8k/test.jsonl
        out: folder for the masks
        n: lengths of the runs of tokens that are looked for
        mask_n: that of the mask: a row with such a run of a question is left out
        common: a run in more records than these is a phrase, and masks none
        scores: JSON lines with benchmark, index or id, correct: do contaminated questions score higher?
        tokenizer: its folder, in case it has moved
        workers: processes
        engine: where they run
        partition: of slurm
        json: print the report as JSON
    """
    from hrm_text.data.contamination import find_contamination
    from hrm_text.data.engine import Engine

    with progress_bar("looking for questions", "tokens") as on_progress:
        where = Engine(engine, workers, partition=partition)
        report = find_contamination(
            store, benchmarks, out, where, n=n, mask_n=mask_n, common=common, scores=scores,
            tokenizer=tokenizer, on_progress=on_progress,
        )  # fmt: skip
    if json:
        print_json(report.as_json())
    else:
        _show_contamination(report)
    if report.common_runs:
        tell(f"{report.common_runs:,} runs of {mask_n} tokens are in more than {common:,} records, and mask none")
    tell(f"wrote {out}: {report.masked:,} of {report.rows:,} rows masked. Next:")
    tell(f"  hrm-text data sample {store} --out SAMPLED --rules RULES.yaml --epochs 4 --exclude {out}")


def _show_contamination(report: ContaminationReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("benchmark", title="Questions by the share of their tokens in the corpus", title_justify="left")
    for title in ("n", "all", "too short", "clean", "not clean", "not dirty", "dirty"):
        table.add_column(title, justify="right")
    for found in report.benchmarks:
        cells = []
        for subset in found.subsets:
            cell = f"{subset.questions:,}"
            if subset.score is not None:
                cell += f"\n{subset.score:.1%}"
            if subset.z is not None:
                cell += f"\nZ {subset.z:+.1f}" + (" !" if subset.flagged else "")
            cells.append(cell)
        table.add_row(found.benchmark, str(found.n), f"{found.questions:,}", f"{found.too_short:,}", *cells)
    console.print(table)
    for found in report.benchmarks:
        if found.sources:
            sources = ", ".join(f"{source['source']} {source['runs']:,}" for source in found.sources[:5])
            line = f"{found.benchmark}: most runs of {found.n} in {sources}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


COMMANDS: dict[str, Callable[..., None]] = {"duplicates": duplicates, "contamination": contamination}
