"""The data report: what a token store or a sampled folder holds, as one HTML file and as Markdown with its pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hrm_text.contracts import UserError
from hrm_text.data.corpus_stats import CorpusStats, SourceStats
from hrm_text.data.inspect import visible
from hrm_text.files import whole_folder
from hrm_text.recipes import data_charts
from hrm_text.recipes.pages import count, percent, render_page

HTML, MARKDOWN = "report.html", "report.md"
MOST_TASKS = 60
"""Rows of the table of tasks; a mixture has 5,000."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table of sources: a group, a dataset or a task."""

    name: str
    group: str
    files: int
    rows: int
    usable: int
    truncated: int
    drawn_rows: int
    tokens: int
    share: float
    """Of all tokens."""

    @property
    def times(self) -> float | None:
        """How often a usable row is drawn over all epochs, on average."""
        return self.drawn_rows / self.usable if self.usable else None


def write_data_report(stats: CorpusStats, out: Path) -> Path:
    """Write OUT/report.html, OUT/report.md and the pictures of the latter; returns the path of the HTML file.

    Raises:
        UserError: ``out`` holds something else.
    """
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name] * out.exists()
    others = sorted(name for name in names if name not in (HTML, MARKDOWN) and not name.endswith(".svg"))
    if others:
        raise UserError(f"{out}: is no folder of a report, it holds {others[0]}; choose another place")
    charts = draw(stats)
    with whole_folder(out) as beside:
        (beside / HTML).write_text(render(stats, charts, "data_report.html.j2"), encoding="utf-8", errors="replace")
        (beside / MARKDOWN).write_text(render(stats, charts, "data_report.md.j2"), encoding="utf-8", errors="replace")
        for name, chart in charts.items():
            (beside / f"{name}.svg").write_text(standalone(chart), encoding="utf-8")
    return out / HTML


def draw(stats: CorpusStats) -> dict[str, str]:
    """The charts that there is something to draw for, by name."""
    charts: dict[str, Callable[[], str]] = {}
    tokens = "tokens" if stats.is_store else "tokens drawn over all epochs"
    if stats.sources:
        groups, datasets = (rows[: data_charts.MOST_BARS] for rows in (group_rows(stats), dataset_rows(stats)))
        for name, label, rows in (("groups", "Tokens by group", groups), ("datasets", "Tokens by dataset", datasets)):
            bars = [(row.name, float(row.tokens), f"{count(row.tokens)} · {percent(row.share)}") for row in rows]
            charts[name] = partial(data_charts.bars_chart, name, label, tokens, bars)
    if stats.epochs:
        charts["repeats"] = lambda: data_charts.repeats_chart(stats.epochs)
    if stats.prefix_lengths.samples:
        charts["lengths"] = lambda: data_charts.lengths_chart(
            stats.prefix_lengths, stats.response_lengths, stats.max_seq_len
        )
    packing = stats.packing
    if packing is not None:
        charts["packing"] = lambda: data_charts.packing_chart(packing)
    if stats.cleaning:
        charts["cleaning"] = lambda: data_charts.cleaning_chart(stats)
    return {name: paint() for name, paint in charts.items()}


def render(stats: CorpusStats, charts: Mapping[str, str], template: str) -> str:
    """The report as text. Every string from outside is escaped; only our own charts enter as markup."""
    from markupsafe import Markup

    tasks = task_rows(stats)
    drawn = sum(epoch.tokens for epoch in stats.epochs)
    return render_page(
        template,
        stats=stats,
        title=f"Data report: {visible(stats.path.resolve().name)}",
        charts={name: Markup(chart) for name, chart in charts.items()},
        groups=group_rows(stats),
        datasets=dataset_rows(stats),
        tasks=tasks[:MOST_TASKS],
        num_tasks=len(tasks),
        tokens=drawn if stats.epochs else stats.prefix_lengths.tokens + stats.response_lengths.tokens,
        unique=sum(epoch.first_tokens for epoch in stats.epochs),
        losses=_losses(stats.sources),
        quantiles=[
            (name, [lengths.quantile(share) for share in (0.05, 0.5, 0.95, 0.99, 1.0)], lengths)
            for name, lengths in (("prefix", stats.prefix_lengths), ("response", stats.response_lengths))
        ],
        masks=[
            (mask, sorted(mask.by_source.items(), key=lambda item: -item[1][1])[: data_charts.MOST_BARS])
            for mask in stats.masks
        ],
        cleaning=sorted(stats.cleaning.items()),
        packings={"tokens": "balanced by tokens alone", "balanced": "as trained on: by tokens and by work"},
    )


def group_rows(stats: CorpusStats) -> list[Row]:
    """A line per group, most tokens first."""
    return _summed(stats, lambda source: (stats.groups[source.dataset], stats.groups[source.dataset]))


def dataset_rows(stats: CorpusStats) -> list[Row]:
    """A line per dataset, most tokens first."""
    return _summed(stats, lambda source: (source.dataset, stats.groups[source.dataset]))


def task_rows(stats: CorpusStats) -> list[Row]:
    """A line per source file, most tokens first."""
    return _summed(stats, lambda source: (source.name, stats.groups[source.dataset]))


def _summed(stats: CorpusStats, key: Callable[[SourceStats], tuple[str, str]]) -> list[Row]:
    parts: dict[tuple[str, str], list[SourceStats]] = {}
    for source in stats.sources:
        parts.setdefault(key(source), []).append(source)
    total = max(sum(source.tokens for source in stats.sources), 1)
    rows = [
        Row(
            name=visible(name),
            group=visible(group),
            files=len(sources),
            rows=sum(source.rows for source in sources),
            usable=sum(source.usable for source in sources),
            truncated=sum(source.truncated for source in sources),
            drawn_rows=sum(source.drawn_rows for source in sources),
            tokens=(tokens := sum(source.tokens for source in sources)),
            share=tokens / total,
        )
        for (name, group), sources in parts.items()
    ]
    return sorted(rows, key=lambda row: (-row.tokens, row.name))


def _losses(sources: Sequence[SourceStats]) -> list[tuple[str, int]]:
    """What becomes of the rows of the store, in the order in which they are lost."""
    sums = {
        key: sum(getattr(source, key) for source in sources)
        for key in ("rows", "excluded", "short_response", "too_long", "usable", "truncated")
    }
    return [
        ("rows in the store", sums["rows"]),
        ("left out by a mask", sums["excluded"]),
        ("left out: hardly a response (fewer than 2 tokens)", sums["short_response"]),
        ("left out: no room in the context", sums["too_long"]),
        ("in use", sums["usable"]),
        ("of these, with a response cut to fit", sums["truncated"]),
    ]


def standalone(chart: str) -> str:
    """The wide drawing of a chart as a file of its own: the page's light colours, its own name spaces."""
    found = re.search(r'<svg class="wide".*?</svg>', chart, re.DOTALL)
    assert found, "a chart has a wide drawing"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    drawing = found[0].replace('<svg class="wide"', f"<svg {spaces}", 1)
    for role, colour in LIGHT.items():
        drawing = drawing.replace(f"var(--{role})", colour)
    opening, rest = drawing.split(">", 1)
    return f'{opening}>\n<rect width="100%" height="100%" fill="{LIGHT["paper"]}"/>{rest}\n'


LIGHT = {
    "ink": "#1d1d1f", "faint": "#6d6d72", "grid": "#dedcd7", "band": "#f1efea", "paper": "#fcfbf9",
    "main": "#0f766e", "slow": "#3d5fae", "fast": "#b9651b", "sans": "sans-serif",
}  # fmt: skip
"""The page's colours by day."""
