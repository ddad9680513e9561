"""`hrm-text data sources | clean`: records from sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from hrm_text.cli.terminal import tell


def sources() -> None:
    """List the sources of training records that this package can make itself."""
    from rich.text import Text

    from hrm_text.data.sources import SOURCES

    console = Console(soft_wrap=True)
    for source in SOURCES.values():
        ready = "ready" if source.is_available or source.needs is None else f"needs: {source.needs.how}"
        console.print(Text.assemble((source.name, "bold"), f"  {sum(source.files.values()):,} records  {ready}"))
        console.print(Text(f"    {source.description}. Conditions: {source.condition}. Licence: {source.licence}."))


def clean(sources: Positional[tuple[str, ...]], out: Path, scale: float = 1.0, seed: int = 0, workers: int = 2) -> None:
    """Write the records of some sources: training records to OUT/train, held-out ones to OUT/held_out.

    Args:
        sources: names as `hrm-text data sources` lists them, or all
        out: folder for the records; files that are finished are kept
        scale: factor on the number of records of every source
        seed: of the draws
        workers: processes
    """
    from hrm_text.data.sources import build_gpu_mixture

    reports = build_gpu_mixture(
        out,
        seed,
        scale=scale,
        workers=workers,
        sources=None if sources == ("all",) else sources,
        on_progress=lambda report, done, total: tell(
            f"{done}/{total} {report.source}/{report.file}: {report.examples:,} records [{report.seconds:.1f} s]"
        ),
    )
    tell(f"{sum(report.examples for report in reports):,} records in {out}/train. Next:")
    tell(f"  hrm-text data tokenizer {out}/train --out {out}/tokenizer")


COMMANDS: dict[str, Callable[..., None]] = {"sources": sources, "clean": clean}
