"""The scaling table: how fast XL and L train on 1, 2, 4, 8 GPUs of one machine, and what a run costs by that::

    python benchmarks/scaling.py WORK                   # measures whatever the GPUs found here allow
    python benchmarks/scaling.py WORK --report --docs   # tables and plot, into docs/performance.md

Each cell (a size on a number of GPUs, in bf16 or FP8, shared as fsdp, ddp or hsdp; published global batches; stalls of
checkpoints; a run resumed on half of the GPUs) becomes a line of WORK/cells.jsonl when it is measured, or with the last
words of its process when it failed. The same command goes on with what is missing. The most worth comes first, as far
as the time reaches. Steps of several GPUs take turns with the same GPUs training side by side without exchange.
`--device cpu --sizes tiny` tries all of it on processes of a CPU, where seconds mean nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, its neighbours are found from the folder above

from benchmarks.scaling_launch import ROOT, Measuring, has_checkpoint
from benchmarks.scaling_plan import KINDS, RECIPES, Cell, Cells, affordable, all_cells, impossible, launches, left_to_do
from hrm_text.contracts import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of cells.jsonl, on a disk with room for two checkpoints")
    parser.add_argument("--gpus", type=numbers, default=[1, 2, 4, 8], help="such as 1,2,4,8 (default)")
    parser.add_argument("--sizes", type=names, default=["XL", "L"], help=f"of {', '.join(RECIPES)}; default XL,L")
    parser.add_argument("--kinds", type=kinds, help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="most of this call (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--retry", action="store_true", help="measure what failed once more")
    parser.add_argument("--commit", help="of the code, where there is no Git repository to ask")
    parser.add_argument("--plan", action="store_true", help="say what would be measured, and in how many seconds")
    parser.add_argument("--report", action="store_true", help="tables and plot of what has been measured")
    parser.add_argument("--docs", action="store_true", help="with --report: into docs/performance.md and docs/images")
    parser.add_argument("--price", type=float, default=2.0, help="dollars for an hour of a GPU (default: %(default)s)")
    given = parser.parse_args(arguments)
    began = time.time()
    given.work.mkdir(parents=True, exist_ok=True)
    work = given.work.resolve()
    try:
        if given.report:
            from benchmarks.scaling_report import into_docs, report  # what measuring can do without

            written = report(work, given.sizes, given.gpus, given.price)
            print(written.read_text(encoding="utf-8"))
            if given.docs:
                print(f"wrote {', '.join(map(str, into_docs(work, ROOT / 'docs')))}", file=sys.stderr)
            return 0
        return measure(given, work, began)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def measure(given: argparse.Namespace, work: Path, began: float) -> int:
    """Measure, or say what would be measured."""
    on_cuda = given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    gpus = torch.cuda.device_count() if on_cuda else max(given.gpus)
    float8 = on_cuda and torch.cuda.get_device_capability() >= (8, 9)
    cells = all_cells(given.sizes, given.gpus, gpus)
    if given.kinds:
        cells = [cell for cell in cells if cell.kind in given.kinds]
    reasons = {cell: impossible(cell, gpus, float8) for cell in cells}
    able = [cell for cell in cells if reasons[cell] is None]
    lines = Cells(work).read()
    wanted = left_to_do(able, lines, lambda cell: has_checkpoint(work, cell), given.retry)
    console = Console(stderr=True)
    if given.plan:
        chosen = affordable(wanted, 60 * given.minutes)
        for launch in launches(chosen):
            console.print(f"{launch.ranks} GPUs, {launch.seconds:.0f} s")
            for group in launch.groups:
                console.print("  " + "; ".join(cell.name for cell in group))
        console.print(f"in all {sum(launch.seconds for launch in launches(chosen)):.0f} s; {len(wanted)} cells wanted")
        return 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("cells", total=60 * given.minutes if wanted else 0)

        def say(text: str) -> None:
            planned = affordable(left(), ends_at - time.time())
            soon = sum(launch.seconds for launch in launches(planned))
            passed = time.time() - began
            bar.update(task, total=passed + soon, completed=passed)
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        def left() -> list[Cell]:
            return left_to_do(able, Cells(work).read(), lambda cell: has_checkpoint(work, cell))

        ends_at = began + 60 * given.minutes
        made: dict[str, Any] = {"commit": given.commit or commit(), "gpus": gpus}
        Measuring(work, "cuda" if on_cuda else "cpu", ends_at, made, say).all(able, given.retry)
    lines = Cells(work).read()
    count = {status: sum(line.status == status for line in lines.values()) for status in ("done", "failed")}
    words = [f"{work / 'cells.jsonl'}: {count['done']} cells measured, {count['failed']} failed"]
    for reason in sorted({reason for reason in reasons.values() if reason}):
        found = [cell.name for cell in cells if reasons[cell] == reason]
        words.append(f"not run: {reason} ({len(found)}): {', '.join(found)}")
    if missing := left():
        words.append(f"{len(missing)} cells left for want of time; the same command goes on with them")
    words.append(f"next: python benchmarks/scaling.py {given.work} --report --docs")
    for text in words:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 1 if count["failed"] else 0


def numbers(text: str) -> list[int]:
    found = sorted({int(part) for part in text.split(",")})
    if not found or found[0] < 1:
        raise ValueError
    return found


def kinds(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"unknown kind {unknown[0]!r}; choose from {', '.join(KINDS)}")
    return found


def names(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in RECIPES]:
        raise argparse.ArgumentTypeError(f"unknown size {unknown[0]!r}; choose from {', '.join(RECIPES)}")
    return found


def commit() -> str:
    """The commit of the code, and whether it was changed since."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
