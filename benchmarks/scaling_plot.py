"""The picture of the scaling table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.loss_curves import FAINT, RUN_COLOURS, STYLE, with_rules_across

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOAL = 0.95
"""Efficiency that is aimed at."""

Curve = Sequence[tuple[int, float, float]]
"""(GPUs, efficiency, tokens/s of a GPU)."""


def draw(curves: Mapping[tuple[str, str], Curve]) -> Figure:
    """Efficiency and tokens/s of a GPU by the number of GPUs; a size has a colour, FP8 is dashed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 4.2), dpi=200, layout="constrained")
        efficiency, rate = figure.subplots(1, 2)
        counts = sorted({gpus for curve in curves.values() for gpus, _, _ in curve})
        sizes = list(dict.fromkeys(size for size, _ in curves))
        for (size, precision), curve in curves.items():
            gpus, shares, rates = zip(*sorted(curve), strict=True)
            line: Any = {
                "color": RUN_COLOURS[sizes.index(size) % len(RUN_COLOURS)], "linewidth": 1.6, "marker": "o",
                "markersize": 4.5, "linestyle": "solid" if precision == "bf16" else (0, (4, 1.5)),
            }  # fmt: skip
            efficiency.plot(gpus, [100 * share for share in shares], label=f"{size}, {precision}", **line)
            rate.plot(gpus, [tokens / 1e3 for tokens in rates], **line)
        efficiency.axhline(100 * GOAL, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)))
        goal: Any = {"ha": "left", "va": "top", "color": FAINT, "fontsize": 10}
        efficiency.annotate(f"goal for 8 GPUs, {GOAL:.0%}", (counts[0], 100 * GOAL - 0.1), **goal)
        low = min(100 * GOAL, *(100 * share for curve in curves.values() for _, share, _ in curve))
        efficiency.set_ylim(low - 2, 101.5)
        rate.set_ylim(0, 1.08 * max(tokens / 1e3 for curve in curves.values() for _, _, tokens in curve))
        efficiency.set_title("Against the same GPUs without exchange, %")
        rate.set_title("Thousand tokens/s of one GPU")
        for axes in (efficiency, rate):
            _tidy(axes, counts)
        figure.legend(*efficiency.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _tidy(axes: Axes, counts: Sequence[int]) -> None:
    """GPUs by powers of two."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlim(counts[0] / 1.15, counts[-1] * 1.15)
    axes.set_xlabel("GPUs, fsdp")
    with_rules_across(axes)
