"""The charts of the report: inline SVG whose text is text and whose colours are the page's CSS variables.

Matplotlib draws with one marker colour per role; the marker is then replaced by ``var(--role)``. So the same drawing
serves light and dark. Each chart is drawn twice, for a wide page and for a phone; CSS shows the one that fits.
"""

from __future__ import annotations

import html
import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, BAND, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
"""Text; secondary text; grid lines; shaded bands; the page itself."""
MAIN, SLOW, FAST = "#060606", "#070707", "#080808"
"""The trained model; the H stack; the L stack."""
ROLES = {
    INK: "ink",
    FAINT: "faint",
    GRID: "grid",
    BAND: "band",
    PAPER: "paper",
    MAIN: "main",
    SLOW: "slow",
    FAST: "fast",
}

WIDE_INCHES, NARROW_INCHES = 8.2, 4.2
SMOOTH_POINTS = 200
"""Longer curves are drawn as the means of this many stretches over a pale line of the raw values."""
LABEL_CHARACTERS = 28

Values = npt.NDArray[np.float64]
Paint = Callable[["Figure", bool], None]


def accuracy_chart(tasks: Sequence[Any]) -> str:
    """A row per task: before (hollow), after (filled), the 95 % interval (thick line), chance (tick)."""
    rows = sorted(tasks, key=lambda task: task["after"])

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        plain_frame(axes, grid="x")
        after = 100 * np.array([task["after"] for task in rows])
        before = 100 * np.array([task["before"] for task in rows])
        chance = 100 * np.array([task["chance"] for task in rows])
        low, high = (100 * np.array([task[key] for task in rows]) for key in ("low", "high"))
        y = np.arange(len(rows))
        axes.hlines(y, np.minimum(before, after), np.maximum(before, after), color=GRID, linewidth=1.2)
        axes.hlines(y, low, high, color=MAIN, linewidth=6, alpha=0.28, label="95 % interval")
        axes.plot(
            chance, y, linestyle="none", marker="|", markersize=11, markeredgewidth=1.4, color=INK, label="chance"
        )
        dot: Any = {"linestyle": "none", "marker": "o", "clip_on": False, "zorder": 3}
        axes.plot(before, y, **dot, markersize=5, markerfacecolor=PAPER, markeredgecolor=FAINT, label="untrained")
        axes.plot(after, y, **dot, markersize=6, color=MAIN, label="trained")
        axes.axvline(95, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        for row, value in enumerate(after):
            axes.annotate(f"{value:.1f}", (1, row), xycoords=("axes fraction", "data"), xytext=(38, 0),
                          textcoords="offset points", ha="right", va="center", fontsize=8.5, color=INK)  # fmt: skip
        axes.set(xlim=(0, 100), ylim=(-0.6, len(rows) - 0.4), xlabel="exact answers, %")
        separator = "\n" if narrow else "  ·  "
        axes.set_yticks(y, [f"{shortened(task['task'])}{separator}{task['condition']}" for task in rows])
        axes.tick_params(axis="y", pad=9)
        axes.set_xticks([0, 25, 50, 75, 95, 100], ["0", "25", "50", "75", "95", ""])
        legend_above(figure, axes, columns=2 if narrow else 4)

    row_inches = 0.25
    return as_svg("accuracy", "Exact-match accuracy per task, untrained and trained", paint,
                wide=0.9 + row_inches * len(rows), narrow=1.1 + 1.45 * row_inches * len(rows))  # fmt: skip


def learning_chart(steps: Sequence[Any], validation: Sequence[Any]) -> str:
    """Loss (log scale) over accuracy, both against the step, with a band for every value of K."""

    def paint(figure: Figure, narrow: bool) -> None:
        losses, accuracies = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for axes in (losses, accuracies):
            plain_frame(axes, grid="y")
        _k_bands(losses, steps, labels=True)
        _k_bands(accuracies, steps, labels=False)
        x, at = _column(steps, "step"), _column(validation, "step")
        _curve(losses, x, _column(steps, "loss"), FAINT, "training batches")
        losses.plot(at, _column(validation, "loss"), color=MAIN, linewidth=1.8, marker="o", markersize=3.5,
                    label="validation (held-out)" if validation else None)  # fmt: skip
        losses.set(ylabel="loss per token", yscale="log")
        _plain_log_ticks(losses)
        legend_above(figure, losses, columns=1 if narrow else 2)

        shown, where = (validation, at) if validation else (steps, x)
        for key, colour, dashes, label in (
            ("exact_accuracy", MAIN, "solid", "whole answer"),
            ("token_accuracy", FAINT, (0, (4, 2)), "tokens"),
        ):
            accuracies.plot(
                where, 100 * _column(shown, key), color=colour, linewidth=1.6, linestyle=dashes, label=label
            )
        accuracies.set(ylabel="correct, %", xlabel="step", ylim=(0, 101), yticks=(0, 50, 100))
        accuracies.legend(loc="lower right", ncols=2, handlelength=1.6, labelcolor=INK)
        _thousands(accuracies)

    return as_svg("learning", "Loss and accuracy over the training steps", paint, wide=4.3, narrow=4.2)


def schedule_chart(steps: Sequence[Any]) -> str:
    """K and the learning rate against the step."""

    def paint(figure: Figure, narrow: bool) -> None:
        depths, rates = two_charts(figure, narrow)
        x, k, rate = _column(steps, "step"), _column(steps, "k"), _column(steps, "lr")
        for axes, title in ((depths, "K, module calls with gradient"), (rates, "learning rate")):
            plain_frame(axes, grid="y")
            axes.set_title(title, loc="left")
            axes.set_xlabel("step")
            _thousands(axes)
        depths.plot(x, k, color=SLOW, linewidth=2, drawstyle="steps-post")
        if np.isfinite(k).any():
            depths.set(ylim=(0, np.nanmax(k) + 0.6), yticks=range(int(np.nanmax(k)) + 1))
        rates.plot(x, rate, color=MAIN, linewidth=2)
        rates.set_ylim(bottom=0)
        rates.yaxis.set_major_formatter(_scientific)

    return as_svg("schedule", "K and the learning rate over the training steps", paint, wide=2.1, narrow=3.9)


def norms_chart(norms: Sequence[Any]) -> str:
    """For every module call in order: the norm of the state that it writes, and of the change that it makes."""

    def paint(figure: Figure, narrow: bool) -> None:
        levels, changes = two_charts(figure, narrow)
        x = np.arange(len(norms))
        colours = [SLOW if norm["stack"] == "H" else FAST for norm in norms]
        for axes, title in ((levels, "norm of the state"), (changes, "norm of the change")):
            plain_frame(axes, grid="y")
            axes.set_title(title, loc="left")
            axes.set_xticks(x, [norm["call"] for norm in norms])
            axes.set_xlim(-0.6, len(norms) - 0.4)
        untrained, trained = _column(norms, "norm_before_training"), _column(norms, "norm_after")
        levels.plot(x, untrained, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        levels.plot(x, trained, color=FAINT, linewidth=1)
        levels.scatter(x, untrained, s=70, facecolor=PAPER, edgecolor=colours, linewidth=1.2, zorder=3)
        levels.scatter(x, trained, s=20, color=colours, zorder=3)
        changes.bar(x, np.nan_to_num(_column(norms, "change")), width=0.62, color=colours)
        changes.margins(y=0.1)
        top = np.nanmax([*untrained, *trained, 0.0])
        levels.set_ylim(0, 1.15 * top if top > 0 else 1)

    return as_svg("norms", "State norm and state change per module call", paint, wide=2.3, narrow=4.1)


def stages_chart(stages: Sequence[Any]) -> str:
    """A bar per stage, in order, as long as the stage took."""

    def paint(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        plain_frame(axes, grid="x")
        y, seconds = np.arange(len(stages)), _column(stages, "seconds")
        axes.barh(y, np.nan_to_num(seconds), height=0.55, color=MAIN)
        for row, value in enumerate(seconds):
            axes.annotate(f"{value:,.1f}", (np.nan_to_num(value), row), xytext=(5, 0), textcoords="offset points",
                          va="center", fontsize=8.5)  # fmt: skip
        axes.set_yticks(y, [shortened(stage["name"]) for stage in stages])
        axes.set(xlabel="seconds", ylim=(len(stages) - 0.4, -0.6))
        axes.margins(x=0.12)

    height = 0.7 + 0.26 * len(stages)
    return as_svg("stages", "Seconds per stage", paint, wide=height, narrow=height)


def as_svg(name: str, label: str, paint: Paint, *, wide: float, narrow: float) -> str:
    """The chart for both widths; ``wide`` and ``narrow`` are its heights in inches. Safe to put into a page."""
    # A first start builds a font cache and would announce it in the middle of the live display.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "hrm-text",  # text stays text; the same chart gives the same bytes
        "text.parse_math": False,                            # a $ in a task's name is a $
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 9,
        "text.color": INK, "axes.titlecolor": INK, "axes.labelcolor": FAINT, "xtick.labelcolor": FAINT,
        "ytick.labelcolor": INK, "xtick.color": GRID, "ytick.color": GRID, "axes.edgecolor": GRID, "grid.color": GRID,
        "axes.facecolor": "none", "legend.frameon": False, "axes.titlepad": 8,
    }  # fmt: skip
    drawings = []
    for width, height, inches in (("wide", wide, WIDE_INCHES), ("narrow", narrow, NARROW_INCHES)):
        with matplotlib.rc_context(style), warnings.catch_warnings():
            # Text is measured with the font that Matplotlib ships; the browser has the glyphs that it lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
            figure = Figure(figsize=(inches, height), layout="constrained")
            paint(figure, width == "narrow")
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        drawings.append(_for_the_page(buffer.getvalue(), f"{name}-{width}", label, width))
    return f'<div class="chart">{"".join(drawings)}</div>'


def _for_the_page(svg: str, name: str, label: str, width: str) -> str:
    """Strip what a file needs and a page does not; make names unique in the page; let CSS choose size and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    opening, body = svg.split(">", 1)
    box = re.search(r'viewBox="[\d. ]+"', opening)
    assert box, "Matplotlib writes a viewBox"
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    for colour, role in ROLES.items():
        body = body.replace(colour, f"var(--{role})")
    body = re.sub(r"\n\s*", "\n", body).strip()
    return f'<svg class="{width}" role="img" aria-label="{html.escape(label)}" {box[0]}>{body}'


def shortened(label: str) -> str:
    """One line that leaves room for the chart; the tables show the whole."""
    line = " ".join(label.split())
    return line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 1] + "…"


def _column(rows: Sequence[Any], key: str) -> Values:
    """[len(rows)]; NaN where a row has no value."""
    values = (row.get(key) for row in rows)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _curve(axes: Axes, x: Values, y: Values, colour: str, label: str) -> None:
    if len(x) <= SMOOTH_POINTS:
        axes.plot(x, y, color=colour, linewidth=1.2, label=label)
        return
    stride = -(-len(x) // (5 * SMOOTH_POINTS))
    axes.plot(x[::stride], y[::stride], color=colour, linewidth=0.6, alpha=0.35)
    means = [(part[0].mean(), _mean(part[1])) for part in zip(*(np.array_split(v, SMOOTH_POINTS) for v in (x, y)),
                                                              strict=True)]  # fmt: skip
    axes.plot(*zip(*means, strict=True), color=colour, linewidth=1.4, label=label)


def _mean(values: Values) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _k_bands(axes: Axes, steps: Sequence[Any], *, labels: bool) -> None:
    """Shade every second stretch of equal K; write K above its stretch."""
    k, x = _column(steps, "k"), _column(steps, "step")
    starts = [0, *(np.flatnonzero(np.diff(k)) + 1)] if len(k) else []
    for number, start in enumerate(starts):
        if not np.isfinite(k[start]):
            continue
        left, right = x[start], x[starts[number + 1]] if number + 1 < len(starts) else x[-1]
        if number % 2 == 0:
            axes.axvspan(left, right, color=BAND, linewidth=0, zorder=0)
        if labels:
            text = f"K = {k[start]:.0f}" if right - left > 0.12 * (x[-1] - x[0]) else f"{k[start]:.0f}"
            axes.annotate(text, ((left + right) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, -4),
                          textcoords="offset points", ha="center", va="top", fontsize=8, color=FAINT)  # fmt: skip


def two_charts(figure: Figure, narrow: bool) -> Sequence[Axes]:
    """Two charts, beside each other or stacked."""
    if narrow:
        return figure.subplots(2, 1, gridspec_kw={"hspace": 0.08})
    return figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})


def plain_frame(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="x" if grid == "x" else "y", linewidth=0.7)
    axes.set_axisbelow(True)


def legend_above(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, handlelength=1.4)


def _thousands(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _scientific(value: float, _: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return "0" if value == 0 else f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
