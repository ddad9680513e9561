"""Training and validation loss of several runs over each other, as a picture::

    python benchmarks/loss_curves.py "bf16=runs/bf16" "FP8=runs/fp8" --out docs/images/fp8_loss.png

A run is a label and a folder with a metrics.jsonl. Above, the loss: training pale and smoothed, validation strong.
Below, how far the validation loss of every run is from that of the first one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson

from hrm_text.contracts import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, PAPER = "#1d1d1f", "#6d6d72", "#dedcd7", "#fcfbf9"
RUN_COLOURS = ("#0f766e", "#b9651b", "#3d5fae", "#b42318")
"""The light colours of the report (hrm_text/recipes/templates): main, fast, slow, bad."""
RUN_DASHES = ("solid", (0, (4, 1.5)))
"""The colours once, then once more dashed: enough for eight runs."""
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.labelsize": 11, "legend.fontsize": 11,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": GRID, "ytick.color": GRID,
    "xtick.labelcolor": FAINT, "ytick.labelcolor": FAINT, "axes.edgecolor": GRID, "grid.color": GRID,
    "axes.facecolor": PAPER, "figure.facecolor": PAPER, "legend.frameon": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.titlepad": 9,
}  # fmt: skip
"""Of matplotlib, for pictures of a page's width."""
SETTLED = 0.5
"""Share of the steps after which the differences decide their axis: while the loss falls steeply the runs are far
apart, and beside that what remains at the end would be a flat line."""

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """The losses of one run, in nats per supervised token; NaN where one was not finite."""

    label: str
    train_steps: Values
    train_loss: Values
    validation_steps: Values
    validation_loss: Values


def read_curves(label: str, run: Path) -> Curves:
    """The curves in RUN/metrics.jsonl.

    Raises:
        UserError: the file is missing, has a line that is no record, or records no validation.
    """
    path = run / "metrics.jsonl"
    try:
        records = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        losses = {
            kind: np.array([(each["step"], each["loss"]) for each in records if each["kind"] == kind], np.float64)
            for kind in ("step", "validation")
        }
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; expected the folder of a run that has trained") from None
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the metrics of a run: {error}") from None
    for kind, values in losses.items():
        if not len(values):
            raise UserError(f"{path}: no record of kind {kind!r}, and this picture compares them")
    return Curves(label, *losses["step"].T, *losses["validation"].T)


def smoothed(values: Values, window: int) -> Values:
    """Mean of the ``window`` values around each, fewer at the ends, those that are NaN left out."""
    kernel = np.ones(min(window, len(values)))
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), kernel, "same")
    counts = np.convolve(finite, kernel, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def differences(run: Curves, first: Curves) -> tuple[Values, Values]:
    """Steps after which both were validated, and by how much the run's loss is above the first one's there."""
    steps, ours, theirs = np.intersect1d(run.validation_steps, first.validation_steps, return_indices=True)
    return steps, run.validation_loss[ours] - first.validation_loss[theirs]


def draw(runs: Sequence[Curves], window: int) -> Figure:
    """The picture; it is a page's width on a screen, at twice the pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 6.4), dpi=200, layout="constrained")
        losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_losses(losses, runs, window)
        _draw_differences(gaps, runs)
        for axes in (losses, gaps):
            with_rules_across(axes)
        figure.legend(*losses.get_legend_handles_labels(), loc="outside upper left", ncols=min(len(runs), 4))
    return figure


def with_rules_across(axes: Axes) -> None:
    """Axes with horizontal rules, and nothing else around the lines."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_losses(axes: Axes, runs: Sequence[Curves], window: int) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for number, run in enumerate(runs):
        colour, dashes = _line(number)
        axes.plot(run.train_steps, smoothed(run.train_loss, window), color=colour, linestyle=dashes, linewidth=0.9,
                  alpha=0.45)  # fmt: skip
        axes.plot(run.validation_steps, run.validation_loss, color=colour, linestyle=dashes, linewidth=1.4,
                  marker="o", markersize=3.2, label=run.label)  # fmt: skip
    axes.set_title(f"Loss: validation with dots, training pale (mean of {window} steps)")
    axes.set(ylabel="nats per token", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_differences(axes: Axes, runs: Sequence[Curves]) -> None:
    from matplotlib.ticker import MaxNLocator

    first, last_step = runs[0], max(run.validation_steps[-1] for run in runs)
    most, settled_most = 0.0, 0.0
    for number, run in enumerate(runs):
        steps, gaps = differences(run, first)
        colour, dashes = _line(number)
        axes.plot(steps, gaps, color=colour, linestyle=dashes, linewidth=1.4, marker="o", markersize=3.2)
        sizes = np.where(np.isfinite(gaps), np.abs(gaps), 0)
        most = max(most, sizes.max(initial=0))
        settled_most = max(settled_most, sizes[steps > SETTLED * last_step].max(initial=0))
    title = f"Validation loss minus that of {first.label}"
    if settled_most > 0:
        limit = 1.3 * settled_most
        axes.set_ylim(-limit, limit)
        title += " (early differences are larger than the axis)" if most > limit else ""
    axes.set_title(title)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _line(number: int) -> tuple[str, Any]:
    """Colour and dashes of a run."""
    return RUN_COLOURS[number % len(RUN_COLOURS)], RUN_DASHES[number // len(RUN_COLOURS)]


def parse_run(text: str) -> tuple[str, Path]:
    """Label and folder of LABEL=RUN_DIR."""
    label, equals, folder = text.partition("=")
    if not (label and equals and folder):
        raise UserError(f"{text!r}: expected LABEL=RUN_DIR, such as FP8=runs/fp8")
    return label, Path(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture; print the last validation losses that it shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_DIR", help="the first one is what the others differ from")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--smooth", type=int, default=20, help="training steps in a mean (default: %(default)s)")
    options = parser.parse_args(arguments)
    most = len(RUN_COLOURS) * len(RUN_DASHES)
    try:
        if len(options.runs) > most:
            raise UserError(f"{len(options.runs)} runs, expected at most {most}: more cannot be told apart")
        if options.smooth < 1:
            raise UserError(f"--smooth is {options.smooth}, expected at least 1")
        runs = [read_curves(*parse_run(text)) for text in options.runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, options.smooth).savefig(options.out, metadata={"Software": None})
    for run in runs:
        steps, gaps = differences(run, runs[0])
        shared = f"{gaps[-1]:+.4f} at step {steps[-1]:,.0f}" if len(steps) else "no step in common"
        print(f"{run.label}: validation loss {run.validation_loss[-1]:.4f} after step {run.validation_steps[-1]:,.0f}, "
              f"{shared} against {runs[0].label}")  # fmt: skip
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
