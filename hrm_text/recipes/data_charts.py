"""The charts of the data report; drawn as those of a run's report are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hrm_text.data.corpus_stats import CorpusStats, EpochStats, LengthCounts, PackingStats
from hrm_text.recipes.charts import FAINT, FAST, MAIN, SLOW, as_svg, legend_above, plain_frame, shortened, two_charts
from hrm_text.recipes.pages import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 24
Bar = tuple[str, float, str]
"""What, how much, and how that is written."""


def bars_chart(name: str, label: str, axis: str, bars: Sequence[Bar]) -> str:
    """A bar per row, the first on top."""

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        plain_frame(axes, grid="x")
        y, lengths = np.arange(len(bars)), np.array([length for _, length, _ in bars])
        axes.barh(y, lengths, height=0.6, color=MAIN)
        for row, (_, length, written) in enumerate(bars):
            axes.annotate(written, (length, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(y, [shortened(what) for what, _, _ in bars])
        axes.set(xlabel=axis, ylim=(len(bars) - 0.4, -0.6))
        axes.set_xlim(left=0)
        axes.margins(x=0.24 if narrow else 0.14)
        _counted(axes)

    height = 0.75 + 0.25 * len(bars)
    return as_svg(name, label, paint, wide=height, narrow=height)


def repeats_chart(epochs: Sequence[EpochStats]) -> str:
    """A bar per epoch: tokens met for the first time, met in an earlier epoch, met again in the same one."""

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        plain_frame(axes, grid="x")
        y, left = np.arange(len(epochs)), np.zeros(len(epochs))
        for key, colour, label in (
            ("first_tokens", MAIN, "first met here"),
            ("earlier_tokens", SLOW, "seen in an earlier epoch"),
            ("again_tokens", FAST, "again in the same epoch"),
        ):
            lengths = np.array([getattr(epoch, key) for epoch in epochs], np.float64)
            axes.barh(y, lengths, left=left, height=0.6, color=colour, label=label)
            left += lengths
        axes.set_yticks(y, [f"epoch {number}" for number in range(len(epochs))])
        axes.set(xlabel="tokens", ylim=(len(epochs) - 0.4, -0.6))
        _counted(axes)
        legend_above(figure, axes, columns=1 if narrow else 3)

    height = 1.0 + 0.3 * len(epochs)
    return as_svg("repeats", "Tokens of every epoch by whether they were met before", paint, wide=height,
                narrow=height + 0.4)  # fmt: skip


def lengths_chart(prefixes: LengthCounts, responses: LengthCounts, max_seq_len: int) -> str:
    """How long prefixes and responses are, in tokens, on a logarithmic axis."""
    # About four bins to a doubling; at the low end a bin cannot be narrower than one token.
    edges = np.unique(np.round(2.0 ** np.arange(0, 17.01, 0.25)).astype(np.int64))

    def paint(figure: Figure, narrow: bool) -> None:
        for axes, lengths, title in zip(two_charts(figure, narrow), (prefixes, responses), ("prefix", "response"),
                                        strict=True):  # fmt: skip
            plain_frame(axes, grid="y")
            axes.set_title(title, loc="left")
            shares = lengths.in_bins(edges) / max(lengths.samples, 1)
            # Bins differ in width on the axis: a share per doubling makes areas comparable.
            heights = 100 * shares / np.diff(np.log2(edges))
            axes.stairs(heights, edges, color=MAIN, fill=True, alpha=0.85)
            axes.set_xscale("log", base=2)
            used = np.flatnonzero(heights)
            last = max(int(edges[used[-1] + 1]) if len(used) else 2, max_seq_len)
            axes.set(xlabel="tokens", ylabel="% of samples per doubling", xlim=(1, 1.25 * last))
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.axvline(max_seq_len, color=FAINT, linewidth=0.9, linestyle=(0, (3, 2)))
            axes.annotate("context", (max_seq_len, 1), xycoords=("data", "axes fraction"), xytext=(-3, -3),
                          textcoords="offset points", ha="right", va="top", fontsize=8, color=FAINT)  # fmt: skip

    return as_svg("lengths", "Lengths of prefixes and responses in tokens", paint, wide=2.6, narrow=4.6)


def packing_chart(packing: PackingStats) -> str:
    """How many batches are how full."""
    counts = np.array(packing.fullness_counts)
    filled = np.flatnonzero(counts)
    first = min(int(filled[0]) if len(filled) else 0, len(counts) - 5)

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        plain_frame(axes, grid="y")
        edges = 100 * np.arange(first, len(counts) + 1) / len(counts)
        axes.stairs(100 * counts[first:] / max(counts.sum(), 1), edges, color=MAIN, fill=True)
        axes.set(xlabel="tokens used, % of a batch", ylabel="% of batches", xlim=(edges[0], 100))

    return as_svg("packing", "How full the batches are", paint, wide=2.1, narrow=2.3)


def cleaning_chart(stats: CorpusStats) -> str:
    """A bar per dataset: the share of its rows that was kept, and the shares of the commonest reasons to drop."""
    shown = sorted(stats.cleaning.items(), key=lambda item: -item[1].read)[:MOST_BARS]
    reasons: dict[str, int] = {}
    for _, cleaning in shown:
        for reason, number in cleaning.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + number
    named = sorted(reasons, key=lambda reason: -reasons[reason])[:2]

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        plain_frame(axes, grid="x")
        y, left = np.arange(len(shown)), np.zeros(len(shown))
        of_row = [[cleaning.dropped[reason] for reason in named] for _, cleaning in shown]
        columns: list[tuple[str, str, list[int]]] = [("kept", MAIN, [cleaning.kept for _, cleaning in shown])]
        for number, (reason, colour) in enumerate(zip(named, (FAST, SLOW), strict=False)):
            columns.append((shortened(reason), colour, [row[number] for row in of_row]))
        rest = [cleaning.dropped.total() - sum(of_row[i]) for i, (_, cleaning) in enumerate(shown)]
        columns.append(("other reasons", FAINT, rest))
        totals = np.array([max(sum(values), 1) for values in zip(*(values for _, _, values in columns), strict=True)])
        for label, colour, values in columns:
            if any(values):
                lengths = 100 * np.array(values) / totals
                axes.barh(y, lengths, left=left, height=0.6, color=colour, label=label)
                left += lengths
        axes.set_yticks(y, [shortened(name) for name, _ in shown])
        axes.set(xlabel="% of what its rows gave", ylim=(len(shown) - 0.4, -0.6), xlim=(0, 100))
        legend_above(figure, axes, columns=1 if narrow else 4)

    height = 1.0 + 0.25 * len(shown)
    return as_svg("cleaning", "Rows kept and dropped by dataset", paint, wide=height, narrow=height + 0.5)


def _counted(axes: Axes) -> None:
    """Ticks as 250 M, 1.5 B."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
