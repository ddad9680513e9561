"""`hrm-text data sources | clean`: records from public datasets, from your own data, and from our generators."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from hrm_text.cli.terminal import notes, print_json, progress_bar, tell
from hrm_text.contracts import UserError, did_you_mean
from hrm_text.data.engine import Kind

if TYPE_CHECKING:
    from hrm_text.data.clean import CleanReport
    from hrm_text.data.sources import Source
    from hrm_text.data.sources.upstream import Dataset

ALL = "all"
GENERATORS = "generators"
_WIDTH = 100


def sources(
    sources: tuple[Path, ...] = (),
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """List what records can come from: public datasets, your own data, and the generators of this package.

    Args:
        sources: Python files of your own cleaners, to be listed too
        json: print everything as one JSON object
    """
    from hrm_text.data.sources import SOURCES
    from hrm_text.data.sources.custom import load_sources
    from hrm_text.data.sources.upstream import DATASETS

    load_sources(sources)
    if json:
        print_json(
            {
                "datasets": [_about_dataset(found) for found in DATASETS.values()],
                "generators": [_about_generator(source) for source in SOURCES.values()],
            }
        )
        return
    terminal = Console()
    console = Console(width=min(terminal.width, _WIDTH) if terminal.is_terminal else _WIDTH, highlight=False)
    for group in dict.fromkeys(found.group for found in DATASETS.values()):
        console.print(Rule(f"datasets: {group}", align="left"))
        for found in DATASETS.values():
            if found.group == group:
                _print_dataset(console, found)
    console.print(Rule("generators: nothing to fetch", align="left"))
    for source in SOURCES.values():
        ready = "ready" if source.is_available or source.needs is None else f"needs: {source.needs.how}"
        _print_block(
            console,
            Text.assemble(
                (source.name, "bold"), f"  {sum(source.files.values()):,} records, {ready}.  Licence: {source.licence}"
            ),
            {"": source.description, "condition": source.condition, "home": source.home},
        )


def _print_dataset(console: Console, found: Dataset) -> None:
    size = f"  about {_short(found.rows)} rows, {_megabytes(found.megabytes)}." if found.rows else ""
    elsewhere = " (not on the hub: --from)" if found.rows and found.hub is None else ""
    _print_block(
        console,
        Text.assemble((found.name, "bold"), f"{size}  Licence: {found.licence}"),
        {
            "": found.description,
            "condition": found.condition,
            "home": found.home + elsewhere,
            "columns": ", ".join(f"{name} ({kind})" for name, kind in found.columns.items()),
        },
    )


def _print_block(console: Console, heading: Text, about: dict[str, str]) -> None:
    """A heading and what there is to say, by name, wrapped below each other."""
    console.print(heading)
    for name, text in about.items():
        first, rest = ("  ", "  ") if not name else (f"  {name:10}", " " * 12)
        lines = textwrap.wrap(text, console.width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
        for line in lines:
            styled = Text(line)
            styled.stylize("dim", 0, len(first))
            console.print(styled, soft_wrap=True)


def _about_dataset(found: Dataset) -> dict[str, object]:
    names = ("name", "group", "description", "licence", "home", "condition", "columns", "files", "rows", "megabytes")
    hub = asdict(found.hub) if found.hub is not None else None
    return {name: getattr(found, name) for name in names} | {"hub": hub, "strata": found.stratum is not None}


def _about_generator(source: Source) -> dict[str, object]:
    names = ("name", "description", "licence", "home", "condition", "files")
    return {name: getattr(source, name) for name in names} | {"ready": source.is_available}


def _short(count: int) -> str:
    """A count as people say it: 7,473; 2.3 M."""
    return f"{count / 1e6:,.1f} M" if count >= 1_000_000 else f"{count:,}"


def _megabytes(megabytes: int) -> str:
    return f"{megabytes / 1000:,.1f} GB" if megabytes >= 1000 else f"{megabytes:,} MB"


def clean(
    names: Positional[tuple[str, ...]],
    out: Path,
    from_: Annotated[Path | None, arg(name="from")] = None,
    filters: tuple[str, ...] = (),
    sources: tuple[Path, ...] = (),
    workers: int = 1,
    engine: Kind = "local",
    partition: str = "",
    scale: float = 1.0,
    seed: int = 0,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Make records of datasets, streamed from the hub or read from a folder. Run again, it goes on where it was.

    Generators write training records to OUT/train and held-out ones to OUT/held_out.

    Args:
        names: as `hrm-text data sources` lists them; all: every public dataset; generators: every generator
        out: folder for the records; files that are finished are kept
        from_: folder of upstream files, DIR/NAME/ for each dataset, or DIR itself for one; without it, the hub
        filters: drop examples: pii, english, or FILE.py:FUNCTION of your own
        sources: Python files of your own cleaners
        workers: processes
        engine: where they run; slurm and ray need their software
        partition: of slurm
        scale: of generators: factor on the number of records
        seed: of generators: of the draws
        json: print what became of the rows as one JSON object
    """
    from hrm_text.data.clean import mixture_names
    from hrm_text.data.sources import SOURCES
    from hrm_text.data.sources.custom import load_sources
    from hrm_text.data.sources.upstream import DATASETS

    load_sources(sources)
    if names in ((), ("",)):
        raise UserError(f"name a dataset or a generator, {ALL} or {GENERATORS}; `hrm-text data sources` lists them")
    generated = [name for name in names if name in SOURCES or name == GENERATORS]
    if not generated:
        _refuse_unknown(names, [*DATASETS, ALL, *SOURCES, GENERATORS])
        chosen = _leave_out_what_is_elsewhere(mixture_names(), from_) if ALL in names else list(names)
        _clean_datasets(chosen, out, from_, filters, sources, workers, engine, partition, json)
    elif len(generated) < len(names):
        raise UserError(f"{', '.join(generated)}: generators and datasets need an --out each; clean them one by one")
    elif from_ is not None or filters or engine != "local":
        raise UserError(f"{', '.join(generated)}: generators take neither --from, --filters nor --engine")
    else:
        _generate(None if GENERATORS in names else names, out, scale, seed, workers, json)


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"unknown source {name!r}: {hint}`hrm-text data sources` lists them all")


def _leave_out_what_is_elsewhere(names: list[str], folder: Path | None) -> list[str]:
    """Of all datasets those that the hub has, where there is no folder; the others are told."""
    from hrm_text.data.sources.upstream import find_dataset

    elsewhere = [name for name in names if find_dataset(name).hub is None] if folder is None else []
    for name in elsewhere:
        tell(f"{name} is left out: fetch it from {find_dataset(name).home} and clean it with --from", "yellow")
    return [name for name in names if name not in elsewhere]


def _clean_datasets(
    names: Sequence[str],
    out: Path,
    folder: Path | None,
    filters: tuple[str, ...],
    sources: tuple[Path, ...],
    workers: int,
    kind: Kind,
    partition: str,
    json: bool,
) -> None:
    from hrm_text.data.clean import clean_datasets
    from hrm_text.data.cleaner import CleanSettings
    from hrm_text.data.engine import Engine

    settings = CleanSettings(filters, tuple(path.resolve() for path in sources))
    engine = Engine(kind, workers, out / ".logs", partition)
    with progress_bar("cleaning", "bytes" if folder is not None else "shards") as on_progress:
        reports = clean_datasets(names, out.resolve(), folder, settings, engine, on_progress)
    if json:
        print_json({"out": str(out), "datasets": {report.dataset: _about_report(report) for report in reports}})
    _show(reports)
    empty = [report.dataset for report in reports if not report.tally.kept]
    if empty:
        raise UserError(f"{', '.join(empty)}: no example was kept; the table says what became of the rows")
    kept = sum(report.tally.kept for report in reports)
    tell(f"{kept:,} records in {out}. Next:")
    tell(f"  hrm-text data tokenizer {out} --out TOKENIZER")


def _about_report(report: CleanReport) -> dict[str, object]:
    return {"sources": report.sources, "reused": report.reused, "files": report.files, **report.tally.as_dict()}


def _show(reports: Sequence[CleanReport]) -> None:
    """A row for every dataset, with what was dropped and why; an example of where for each reason."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("dataset", no_wrap=True)
    for name in ("files", "read", "kept", "dropped"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why, and for example where", overflow="fold")
    for report in reports:
        about = report.tally
        dropped = Text()
        for index, (reason, count) in enumerate(about.dropped.most_common()):
            places = about.examples.get(reason, [])
            dropped.append(("\n" if index else "") + f"{count:,} {reason}")
            dropped.append(f"  {places[0]}" if places else "", "dim")
        counts = (report.files, about.rows, about.kept, about.dropped.total())
        table.add_row(Text(report.dataset), *(f"{count:,}" for count in counts), dropped)
    if len(reports) > 1:
        tallies = [report.tally for report in reports]
        totals = (
            sum(report.files for report in reports),
            sum(about.rows for about in tallies),
            sum(about.kept for about in tallies),
            sum(about.dropped.total() for about in tallies),
        )
        table.add_section()
        table.add_row("in all", *(f"{count:,}" for count in totals), "")
    console = notes()
    console.print(table)
    reused = sum(report.reused for report in reports)
    if reused:
        tell(f"{reused:,} of {sum(report.sources for report in reports):,} upstream files were cleaned before")


def _generate(names: Sequence[str] | None, out: Path, scale: float, seed: int, workers: int, json: bool) -> None:
    from hrm_text.data.sources import build_gpu_mixture

    reports = build_gpu_mixture(
        out,
        seed,
        scale=scale,
        workers=workers,
        sources=names,
        on_progress=lambda report, done, total: tell(
            f"{done}/{total} {report.source}/{report.file}: {report.examples:,} records [{report.seconds:.1f} s]"
        ),
    )
    if json:
        print_json({"out": str(out), "files": [asdict(report) for report in reports]})
    tell(f"{sum(report.examples for report in reports):,} records in {out}/train. Next:")
    tell(f"  hrm-text data tokenizer {out}/train --out {out}/tokenizer")


COMMANDS: dict[str, Callable[..., None]] = {"sources": sources, "clean": clean}
