"""What the published runs cost by the scaling table, through the model of `hrm-text budget`, and its new rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scaling_plan import RECIPES, Cell, Line
from hrm_text.recipes.budget import budget
from hrm_text.recipes.budget_gpus import GPUS
from hrm_text.recipes.budget_measurements import Measurement, predict
from hrm_text.recipes.budget_run import EPOCH_TOKENS, EPOCHS, Question, read_config
from hrm_text.settings import read_yaml, with_options

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = (8, 16)
"""GPUs of the published runs."""


@dataclass(frozen=True)
class Basis:
    """A measured cell, and how much longer its step took than the budget's model says."""

    cell: Cell
    factor: float


@dataclass(frozen=True)
class Cost:
    """Of a published run."""

    size: str
    gpus: int
    precision: str
    budget_hours: float
    basis: Basis
    dollars: float
    published_hours: float | None

    @property
    def factor(self) -> float:
        return self.basis.factor

    @property
    def hours(self) -> float:
        return self.budget_hours * self.factor


def gpu_of(line: Line) -> str | None:
    """The budget's name of the GPU that a cell was measured on."""
    device = line.made["machine"]["device"]
    return next((key for key, gpu in GPUS.items() if gpu.name in device), None)


def measurement(line: Line) -> Measurement | None:
    """A measured step as a row of ``budget_measurements``; None: on no GPU that the budget knows."""
    cell, gpu = line.cell, gpu_of(line)
    if gpu is None:
        return None
    name = ", ".join([
        cell.size, *(["FP8"] if cell.precision == "FP8" else []), *([cell.sharding] if cell.gpus > 1 else []),
        *([f"{cell.passes} passes"] if cell.passes > 1 else []), "scaling table",
    ])  # fmt: skip
    return Measurement(
        name, gpu, cell.size, RECIPES[cell.size].tokens, ms=round(line.figures["step_ms"], 1),
        gib=round(line.figures["peak_bytes"] / 2**30, 1), fp8=cell.precision == "FP8", passes=cell.passes,
        gpus=cell.gpus, gpus_per_node=cell.gpus, sharding=cell.sharding, shard_ranks=cell.shard_ranks,
    )  # fmt: skip


def basis_of(lines: Mapping[Cell, Line], size: str, precision: str, gpus: int) -> Basis | None:
    """The measured cell that is nearest to a run: that of the most GPUs, and their published global batch."""
    able = [
        cell
        for cell in lines
        if (cell.size, cell.precision) == (size, precision) and cell.kind in ("step", "batch") and cell.gpus <= gpus
        and cell.sharding in ("none", "fsdp")
    ]  # fmt: skip
    # A global batch at the run's own number of GPUs; with fewer GPUs it has more passes than the run will make.
    able = [cell for cell in able if cell.kind == "step" or cell.gpus == gpus]
    if not able:
        return None
    best = max(able, key=lambda cell: (cell.gpus, cell.kind == "batch"))
    row = measurement(lines[best])
    return None if row is None else Basis(best, row.measured_ms / predict(row).ms)


def costs(lines: Mapping[Cell, Line], price: float) -> list[Cost]:
    """Of each size that was published, on 8 and 16 GPUs."""
    found = []
    for size, recipe in RECIPES.items():
        for gpus in RUNS:
            for precision in ("bf16", "FP8"):
                basis = basis_of(lines, size, precision, gpus) if recipe.published else None
                if basis is None or recipe.published is None:
                    continue
                gpu = gpu_of(lines[basis.cell])
                assert gpu is not None
                hours = budget_hours(size, gpus, precision, gpu)
                at, published = recipe.published
                dollars = hours * basis.factor * gpus * price
                is_published = at == gpus and precision == "bf16"
                found.append(Cost(size, gpus, precision, hours, basis, dollars, published if is_published else None))
    return found


def budget_hours(size: str, gpus: int, precision: str, gpu: str) -> float:
    """By `hrm-text budget`, with the published global batch and tokens."""
    recipe, path = RECIPES[size], CONFIGS / f"{size}.yaml"
    options = ["--data.sampled", "not-there"] + (["--fp8", "true"] if precision == "FP8" else [])
    if gpus > recipe.micro_batches:
        tokens = recipe.tokens * recipe.micro_batches // gpus
        options += ["--data.micro_batches", str(gpus), "--data.tokens_per_batch", str(tokens)]
    config, _ = read_config(with_options(read_yaml(path), options, str(path)), str(path))
    question = Question(gpus=(gpus,), gpu=gpu, tokens=EPOCHS * EPOCH_TOKENS, lengths="anchor")
    [estimate] = budget(config, question).estimates
    return 24 * estimate.days


def measurement_rows(lines: Mapping[Cell, Line]) -> list[str]:
    """Rows for ``budget_measurements``, with what its model says of each as a comment."""
    rows = []
    for cell, line in lines.items():
        row = measurement(line) if cell.kind in ("step", "batch") else None
        if row is not None:
            words = [repr(row.name), repr(row.gpu), repr(row.size), f"{row.tokens:_}", f"ms={row.ms}", f"gib={row.gib}"]
            words += ["fp8=True"] if row.fp8 else []
            words += [f"passes={row.passes}"] if row.passes > 1 else []
            if row.gpus > 1:
                words += [f"gpus={row.gpus}", f"gpus_per_node={row.gpus}", f"sharding={row.sharding!r}"]
            if row.shard_ranks is not None:
                words.append(f"shard_ranks={row.shard_ranks}")
            said = predict(row)
            error = f"{said.ms / row.measured_ms - 1:+.1%} in time, {said.gib / (row.gib or 1) - 1:+.1%} in memory"
            rows.append(f"    Measurement({', '.join(words)}),  # predicted: {error}".replace("'", '"'))
        if cell.kind == "exchange" and gpu_of(line) == "h200":
            for one in line.figures["exchanges"]:
                words = [f'"{one["name"]}"', f'"{one["unit"]}"', f"{one['elements']:.4g}", str(one["bytes"])]
                rows.append(f"    ExchangeMeasurement({', '.join(words)}, {one['ms']:.3f}, gpus={cell.gpus}),")
    return rows
