"""The cells of the scaling table, what they are worth and take, and the file that remembers which are done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["exchange", "step", "batch", "checkpoint", "resume"]
Precision = Literal["bf16", "FP8"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Recipe:
    """A size as it was published, and about how long a step takes, for estimates of time alone."""

    tokens: int
    """Of a micro-batch, on each GPU."""
    micro_batches: int
    """Of a step, over all GPUs."""
    step_seconds: dict[str, float]
    gib: float
    """Of a checkpoint."""
    published: tuple[int, float] | None = None
    """GPUs (H100) and hours of the published run."""


RECIPES = {
    "XL": Recipe(12_288, 16, {"bf16": 0.47, "FP8": 0.36}, 17.6, published=(16, 46)),
    "L": Recipe(21_504, 8, {"bf16": 0.48, "FP8": 0.38}, 10.3, published=(8, 50)),
    "tiny": Recipe(128, 8, {"bf16": 0.1, "FP8": 0.1}, 0.01),
}

TIMED, WARMUP, PROFILED, FOR_PEAK = 10, 3, 2, 4
"""Steps of a configuration: timed, before, in the profile, and for the peak of memory (``bench_train``)."""
BATCH_TIMED, BATCH_WARMUP = 4, 1
"""The same of published global batches, whose steps are long."""
START_SECONDS, COMPILE_SECONDS, BUILD_SECONDS = 25, 6, 5
"""Of a launch (imports, ranks meeting), of kernels new to it, of building one configuration and reading its profile."""
SAVE_SECONDS_PER_GIB = 1.4
"""From the beginning of a save until it is whole: 22 s for XL's on a virtual disk."""
RUNS: tuple[Kind, Kind] = ("checkpoint", "resume")
RUN_STEPS, SAVED_AT = 12, 6
"""Of the run that is resumed, and after which of them."""


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    kind: Kind
    size: str
    gpus: int
    precision: Precision = "bf16"
    sharding: Literal["none", "fsdp", "ddp", "hsdp"] = "fsdp"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size} {self.gpus} {self.precision} {self.sharding}"

    @property
    def ranks(self) -> int:
        """Processes that measure it: a resumed run goes on with half of those that wrote its checkpoint."""
        return self.gpus // 2 if self.kind == "resume" else self.gpus

    @property
    def passes(self) -> int:
        """Micro-batches that each GPU takes in a step."""
        return RECIPES[self.size].micro_batches // self.gpus if self.kind == "batch" else 1

    @property
    def shard_ranks(self) -> int | None:
        """hsdp: two copies."""
        return self.gpus // 2 if self.sharding == "hsdp" else None

    @property
    def is_run(self) -> bool:
        """Whether it is a training run, in a launch of its own."""
        return self.kind in RUNS

    @property
    def seconds(self) -> float:
        """About how long it takes, launch and reference left out."""
        recipe = RECIPES[self.size]
        step, saving = recipe.step_seconds[self.precision], recipe.gib * SAVE_SECONDS_PER_GIB
        if self.kind == "exchange":
            return 3
        if self.kind == "checkpoint":
            return RUN_STEPS * step + 2 * saving + 0.6 * recipe.gib / self.gpus  # memory of the host is made ready
        if self.kind == "resume":
            return 2 * (RUN_STEPS - SAVED_AT) * step + saving  # reading takes about as long; it saves nothing
        count = BATCH_TIMED + BATCH_WARMUP if self.kind == "batch" else TIMED + WARMUP + PROFILED
        return BUILD_SECONDS + self.passes * step * (count + FOR_PEAK)


def all_cells(sizes: Sequence[str], gpus: Sequence[int], there: int) -> list[Cell]:
    """Every cell, the most worth first: sharing all of the state at any number of GPUs, then the other ways, ...

    there: GPUs of the machine; a run is resumed from the most of them that are asked for.
    """
    most, main = max(gpus), sizes[0]
    most_there = max((n for n in gpus if n <= there), default=most)
    counts = sorted(gpus, key=lambda n: (n > there, n != most_there, n != 1, -n))  # the ends of the curve first
    several = [n for n in counts if n > 1]

    def steps(size: str, precision: Precision, sharding: Literal["fsdp", "ddp", "hsdp"]) -> list[Cell]:
        if sharding == "fsdp":
            return [Cell("step", size, n, precision, "fsdp" if n > 1 else "none") for n in counts]
        # Two copies over one GPU each are what ddp is.
        return [Cell("step", size, n, precision, sharding) for n in several if sharding == "ddp" or n >= 4]

    def batches(precision: Precision) -> list[Cell]:
        found = [Cell("batch", size, n, precision) for size in sizes for n in several]
        return [cell for cell in found if RECIPES[cell.size].micro_batches % cell.gpus == 0 and cell.passes > 1]

    both: tuple[Precision, Precision] = ("bf16", "FP8")
    cells = [*steps(main, "bf16", "fsdp"), *(Cell("exchange", main, n) for n in several), *steps(main, "FP8", "fsdp")]
    cells += [cell for size in sizes[1:] for precision in both for cell in steps(size, precision, "fsdp")]
    cells += [cell for size in sizes for precision in both for cell in steps(size, precision, "ddp")]
    cells += [cell for size in sizes for precision in both for cell in steps(size, precision, "hsdp")]
    cells += batches("bf16")
    cells += [Cell(kind, main, most_there) for kind in RUNS if most_there > 1]
    cells += batches("FP8") + [Cell("checkpoint", main, n) for n in several if n != most_there]
    return cells + ([Cell("resume", main, most)] if most != most_there else [])


def impossible(cell: Cell, gpus: int, float8: bool) -> str | None:
    """Why a machine with so many GPUs cannot measure it; None: it can."""
    if cell.gpus > gpus:
        return f"needs {cell.gpus} GPUs"
    return "FP8 needs a GPU of compute capability 8.9" if cell.precision == "FP8" and not float8 else None


# --------------------------------------------------------------------------------------------------- launches --


@dataclass(frozen=True)
class Launch:
    """One torchrun: groups of cells, those of a group in turns with each other and with what they are compared to."""

    ranks: int
    groups: tuple[tuple[Cell, ...], ...]

    @property
    def seconds(self) -> float:
        """About."""
        return START_SECONDS + sum(group_seconds(group) for group in self.groups)


def group_seconds(group: Sequence[Cell]) -> float:
    """About how long cells in turns take, with the GPUs that train side by side."""
    first = group[0]
    if first.kind != "step":
        return sum(cell.seconds for cell in group)
    reference = first.seconds if first.gpus > 1 else 0.0
    return COMPILE_SECONDS + reference + sum(cell.seconds for cell in group)


def launches(cells: Iterable[Cell], alone: frozenset[Cell] = frozenset()) -> list[Launch]:
    """As few launches as these cells can do with, in the order in which each first has something to measure.

    alone: cells that failed together, and are given a group of their own.
    """
    by_launch: dict[tuple[int, str], dict[tuple[Any, ...], list[Cell]]] = {}
    for cell in cells:
        launch = (cell.ranks, cell.name if cell.is_run else "")
        shared = cell.kind == "step" and cell not in alone
        group = (cell.size, cell.precision, "step") if shared else (cell.name,)
        by_launch.setdefault(launch, {}).setdefault(group, []).append(cell)
    return [Launch(ranks, tuple(map(tuple, groups.values()))) for (ranks, _), groups in by_launch.items()]


def affordable(cells: Sequence[Cell], seconds: float, alone: frozenset[Cell] = frozenset()) -> list[Cell]:
    """Those to measure in so much time: as many as fit, in their order.

    The first that does not fit is the last looked at, as launches may turn out shorter than was thought and leave it
    its time. Where the very first does not, others may.
    """
    taken: list[Cell] = []
    for cell in cells:
        source = Cell("checkpoint", cell.size, cell.gpus)
        if cell.kind == "resume" and source in cells and source not in taken:
            continue  # there will be nothing to resume from
        if sum(launch.seconds for launch in launches([*taken, cell], alone)) <= seconds:
            taken.append(cell)
        elif taken:
            break
    return taken


# ------------------------------------------------------------------------------------------------ what is done --


@dataclass(frozen=True)
class Line:
    """What came of a cell."""

    cell: Cell
    status: Literal["done", "failed"]
    figures: dict[str, Any]
    """Of a failed one, the last words under "error"."""
    made: dict[str, Any]
    """Machine, versions, commit, date."""


class Cells:
    """WORK/cells.jsonl: a line for each cell that was tried; of several lines of one cell the last counts."""

    def __init__(self, work: Path) -> None:
        self.path = work / "cells.jsonl"

    def read(self) -> dict[Cell, Line]:
        """Everything there is; half a line that a killed process left is nothing."""
        found: dict[Cell, Line] = {}
        if self.path.exists():
            for text in self.path.read_bytes().splitlines(keepends=True):
                if text.endswith(b"\n"):
                    values = json.loads(text)
                    cell = Cell(**values.pop("cell"))
                    found[cell] = Line(cell, **values)
        return found

    def add(self, line: Line) -> None:
        """Write a whole line, and see that it is on the disk."""
        with self.path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # cut off: the rest of the file is whole lines
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(asdict(line)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def left_to_do(
    cells: Iterable[Cell], lines: dict[Cell, Line], has_checkpoint: Callable[[Cell], bool], retry: bool = False
) -> list[Cell]:
    """Cells without a line (``retry``: or with a failed one); a resumed run may need its checkpoint made once more."""
    tried = {cell for cell, line in lines.items() if line.status == "done" or not retry}
    cells = list(cells)
    lost = {
        Cell("checkpoint", cell.size, cell.gpus)
        for cell in cells
        if cell.kind == "resume" and cell not in tried and not has_checkpoint(cell)
    }
    return [cell for cell in cells if cell not in tried or (cell in lost and lines[cell].status == "done")]
