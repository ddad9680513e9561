"""The scaling table as Markdown and as a picture, what runs cost by it, and its rows for `hrm-text budget`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.scaling_cost import Basis, costs, measurement_rows
from benchmarks.scaling_plan import RECIPES, SAVED_AT, Cell, Cells, Line, all_cells
from benchmarks.scaling_plot import draw
from hrm_text.contracts import UserError
from hrm_text.files import whole_file

BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"
"""In docs/performance.md, what the report stands between."""
PICTURE = "scaling.png"

Lines = dict[Cell, Line]


def report(work: Path, sizes: Sequence[str], gpus: Sequence[int], price: float) -> Path:
    """Write WORK/scaling.md and WORK/scaling.png; the path of the first.

    sizes, gpus: that there should be; cells without a line are listed with the reason.

    Raises:
        UserError: nothing has been measured.
    """
    lines = Cells(work).read()
    done = {cell: line for cell, line in lines.items() if line.status == "done"}
    if not done:
        raise UserError(f"{work / 'cells.jsonl'}: no cell has been measured; python benchmarks/scaling.py {work}")
    there = max(line.made["gpus"] for line in lines.values())
    cells = all_cells(sizes, gpus, there)
    curves = curves_of(done)
    parts = [heading(done.values()), *step_part(cells, lines)]
    if curves:
        draw(curves).savefig(work / PICTURE, metadata={"Software": None})
        parts += ["", f"![Efficiency and tokens/s of a GPU by the number of GPUs](images/{PICTURE})"]
    parts += [*batch_part(cells, lines), *exchange_part(done), *run_part(cells, lines), *cost_part(done, price)]
    missing = not_run(cells, lines, there)
    if missing:
        parts += ["", "Not measured:", "", *missing]
    path = work / "scaling.md"
    with whole_file(path) as beside:
        beside.write_text("\n".join(parts) + "\n", encoding="utf-8")
    rows = measurement_rows(done)
    if rows:
        (work / "measurements.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def into_docs(work: Path, docs: Path) -> list[Path]:
    """Put the report into docs/performance.md, between its marks, and the picture beside the others."""
    page, picture = docs / "performance.md", work / PICTURE
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{page}: expected a line {BEGIN} and a line {END} after it; the report goes between them")
    text = (work / "scaling.md").read_text(encoding="utf-8")
    with whole_file(page) as beside:
        beside.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    if not picture.exists():
        return [page]
    (docs / "images" / PICTURE).write_bytes(picture.read_bytes())
    return [page, docs / "images" / PICTURE]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int) -> list[str]:
    """A Markdown table whose first columns hold words."""
    rule = ["---" if index < words else "---:" for index in range(len(columns))]
    return [f"| {' | '.join(row)} |".replace("  ", " ") for row in (columns, rule, *rows)]


def heading(lines: Iterable[Line]) -> str:
    """Machine, versions, commit and days, each as often as they differ."""
    made = [line.made for line in lines]
    devices = {f"{one['gpus']} x {one['machine']['device'].partition(': ')[2]}" for one in made}
    versions = {
        ", ".join(f"{name} {one['versions'][key]}" for name, key in SHOWN if key in one["versions"]) for one in made
    }
    commits, days = {one["commit"] for one in made}, {one["date"][:10] for one in made}
    if any(one["machine"]["device"].startswith("cpu") for one in made):
        devices.add("CPUs, in fp32 in the place of bf16")
    words = [", ".join(sorted(found)) for found in (devices, versions, commits, days)]
    return f"{words[0]}; {words[1]}; commit {words[2]}; {words[3]}. `python benchmarks/scaling.py WORK`"


SHOWN = (("Python", "python"), ("PyTorch", "torch"), ("NCCL", "nccl"))


# -------------------------------------------------------------------------------------------------------- steps --


def alone_of(cell: Cell, lines: Lines) -> float | None:
    """Tokens/s of one GPU of the same size and precision, the others idle."""
    line = lines.get(replace(cell, kind="step", gpus=1, sharding="none"))
    return line.figures["budget_per_second"] if line is not None and line.status == "done" else None


def shape(cell: Cell) -> str:
    """How the state is shared, in a table."""
    return f"hsdp, 2 copies over {cell.gpus // 2}" if cell.sharding == "hsdp" else cell.sharding.replace("none", "-")


def step_part(cells: Sequence[Cell], lines: Lines) -> list[str]:
    """The table of bare steps."""
    columns = ["", "", "GPUs", "shared as", "tokens/s of a GPU", "beside, nothing exchanged", "efficiency",
               "of one GPU alone", "MFU", "peak GiB", "exposed communication, ms", "hidden", "ms a step"]  # fmt: skip
    rows = []
    for cell in in_table_order(cells, "step"):
        line = lines.get(cell)
        if line is None or line.status != "done":
            continue
        figures, alone = line.figures, alone_of(cell, lines)
        rate, beside = figures["budget_per_second"], figures.get("beside")
        exposed = (figures["ms_by_part"] or {}).get("communication, exposed")
        rows.append([
            cell.size, cell.precision, str(cell.gpus), shape(cell), f"{rate:,.0f}",
            f"{beside['budget_per_second']:,.0f}" if beside else "",
            f"{rate / beside['budget_per_second']:.1%}" if beside else "",
            f"{rate / alone:.1%}" if alone else "",
            "" if figures["mfu"] is None else f"{figures['mfu']:.1%}",
            f"{figures['peak_bytes'] / 2**30:.1f}",
            "" if exposed is None else f"{exposed:.1f}",
            "" if exposed is None else f"{figures['hidden_communication_ms']:.1f}",
            f"{figures['step_ms']:,.1f}",
        ])  # fmt: skip
    note = (
        "Efficiency: against the same GPUs training side by side without exchange, step by step in turns. MFU: of the "
        "bf16 peak (989 TFLOP/s for an H200), for FP8 too. Communication: of one profiled step of rank 0."
    )
    return ["", note, "", *table(columns, rows, 2)] if rows else []


def in_table_order(cells: Iterable[Cell], kind: str) -> list[Cell]:
    """By size, precision, GPUs, sharding."""
    sizes, ways = list(RECIPES), ("none", "fsdp", "ddp", "hsdp")
    found = [cell for cell in cells if cell.kind == kind]
    return sorted(found, key=lambda c: (sizes.index(c.size), c.precision == "FP8", c.gpus, ways.index(c.sharding)))


def curves_of(done: Lines) -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """Of each size and precision, fully shared: (GPUs, efficiency, tokens/s of a GPU)."""
    curves: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for cell in in_table_order(done, "step"):
        if cell.sharding in ("none", "fsdp"):
            figures = done[cell].figures
            rate = figures["budget_per_second"]
            beside = figures["beside"]["budget_per_second"] if "beside" in figures else rate
            curves.setdefault((cell.size, cell.precision), []).append((cell.gpus, rate / beside, rate))
    return curves


# -------------------------------------------------------------------------------------- batches, exchanges, runs --


def batch_part(cells: Sequence[Cell], lines: Lines) -> list[str]:
    """Published global batches, which fewer GPUs accumulate."""
    columns = ["", "", "tokens a step", "GPUs", "passes of a GPU", "ms a step", "tokens/s of all", "of one GPU alone",
               "MFU", "peak GiB"]  # fmt: skip
    rows = []
    for cell in in_table_order(cells, "batch"):
        line = lines.get(cell)
        if line is not None and line.status == "done":
            figures, alone = line.figures, alone_of(cell, lines)
            rate, recipe = figures["budget_per_second"], RECIPES[cell.size]
            rows.append([
                cell.size, cell.precision, f"{recipe.tokens * recipe.micro_batches:,}", str(cell.gpus),
                str(cell.passes), f"{figures['step_ms']:,.0f}", f"{rate * cell.gpus:,.0f}",
                f"{rate / alone:.1%}" if alone else "",
                "" if figures["mfu"] is None else f"{figures['mfu']:.1%}", f"{figures['peak_bytes'] / 2**30:.1f}",
            ])  # fmt: skip
    words = "Published global batches, `fsdp`, gradients added up over the passes:"
    return ["", words, "", *table(columns, rows, 2)] if rows else []


def exchange_part(done: Lines) -> list[str]:
    """Collectives by themselves."""
    rows = [
        [str(cell.gpus), one["name"], "fp32" if one["bytes"] == 4 else "bf16", one["unit"], f"{one['ms']:.3f}"]
        for cell in in_table_order(done, "exchange")
        for one in done[cell].figures["exchanges"]
    ]
    columns = ["GPUs", "collective", "", "of one", "ms"]
    return ["", "Collectives with nothing beside them:", "", *table(columns, rows, 4)] if rows else []


def run_part(cells: Sequence[Cell], lines: Lines) -> list[str]:
    """Stalls of checkpoints, and the resumed run beside the one that was not stopped."""
    parts, rows = [], []
    for cell in in_table_order(cells, "checkpoint"):
        line = lines.get(cell)
        if line is not None and line.status == "done":
            first, later = line.figures["saves"]
            rows.append([cell.size, str(cell.gpus), f"{first['stalled']:.2f}", f"{later['stalled']:.2f}",
                         f"{first['whole_after']:.1f}", f"{later['whole_after']:.1f}"])  # fmt: skip
    columns = ["", "GPUs", "training waits, first save, s", "a later one, s", "first whole after, s", "later, s"]
    if rows:
        parts += ["", "Checkpoints, `fsdp`, all ranks writing:", "", *table(columns, rows, 1)]
    for cell in in_table_order(cells, "resume"):
        source, line = lines.get(replace(cell, kind="checkpoint")), lines.get(cell)
        if source is None or line is None or source.status != "done" or line.status != "done":
            continue
        whole, resumed = source.figures["losses"], line.figures["losses"]
        largest = max(abs(resumed[step] - whole[step]) / whole[step] for step in resumed)
        parts += [
            "",
            f"{cell.size}, bf16, `fsdp`, random samples: saved by {cell.gpus} GPUs after step {SAVED_AT}, resumed on "
            f"{cell.ranks}. Losses of the resumed steps differ by {largest:.1e} at most (relative).",
            "",
            *table(
                ["step", *whole],
                [[f"{cell.gpus} GPUs", *(f"{loss:.4f}" for loss in whole.values())],
                 [f"resumed on {cell.ranks}", *(f"{resumed[step]:.4f}" if step in resumed else "" for step in whole)]],
                1,
            ),
        ]  # fmt: skip
    return parts


def cost_part(done: Lines, price: float) -> list[str]:
    """The published runs by these figures."""
    rows = []
    for row in costs(done, price):
        rows.append([
            row.size, str(row.gpus), row.precision, f"{row.budget_hours:,.1f}", f"{row.factor:.3f}",
            f"{row.hours:,.1f}", f"{row.dollars:,.0f}",
            f"{row.published_hours:g} h, ${row.published_hours * row.gpus * price:,.0f}" if row.published_hours else "",
            basis_words(row.basis, row.gpus),
        ])  # fmt: skip
    columns = ["", "GPUs", "", "hours by `budget`", "measured / `budget`", "hours", "dollars", "published (H100)", "by"]
    if not rows:
        return []
    note = (
        f"Published runs (4 epochs of 14 B tokens, published global batches, K with its warm-up) on this GPU at "
        f"${price:g} an hour: `hrm-text budget` times what was measured over what it predicts for that cell."
    )
    return ["", note, "", *table(columns, rows, 1)]


def basis_words(basis: Basis, gpus: int) -> str:
    """What a cost rests on; more GPUs than were measured are called extrapolated."""
    what = "global batch" if basis.cell.kind == "batch" else "steps"
    measured = f"{what} on {basis.cell.gpus}"
    return f"measured: {measured}" if basis.cell.gpus == gpus else f"**extrapolated** from {measured}"


# ----------------------------------------------------------------------------------------------------- not run --


def not_run(cells: Sequence[Cell], lines: Lines, there: int) -> list[str]:
    """Cells without figures by their reason; those of too many GPUs are no more than counted."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        line = lines.get(cell)
        if line is None:
            reason = f"not run: needs {cell.gpus} GPUs" if cell.gpus > there else "not run"
        elif line.status == "failed":
            words = line.figures["error"].splitlines()
            reason = f"failed: {words[-1] if words else ''}"
        else:
            continue
        reasons.setdefault(reason, []).append(cell.name)
    return [
        f"* {reason}: {f'{len(found)} cells' if 'needs' in reason else ', '.join(found)}"
        for reason, found in reasons.items()
    ]
