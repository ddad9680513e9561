"""What the ranks of one launch do for the scaling table: ``torchrun ... benchmarks/scaling_ranks.py JOB.json``.

Rank 0 prints a line of JSON when it begins a group of cells, and one for each cell that it has measured.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, its neighbours are found from the folder above

from benchmarks.scaling_launch import run_folder
from benchmarks.scaling_plan import (
    BATCH_TIMED,
    BATCH_WARMUP,
    RECIPES,
    RUN_STEPS,
    SAVED_AT,
    TIMED,
    WARMUP,
    Cell,
    group_seconds,
)
from hrm_text.files import write_json
from hrm_text.model.checkpoint_files import step_folders
from hrm_text.model.config import ModelConfig, preset
from hrm_text.model.recurrence import build
from hrm_text.recipes.bench_train import BenchConfig, Timing, model_of, of_all_ranks, timed
from hrm_text.recipes.provenance import machine, versions
from hrm_text.recipes.stopwatch import Stopwatch
from hrm_text.recipes.synthetic import CONTEXT, DISTRIBUTIONS
from hrm_text.settings import from_mapping, to_mapping
from hrm_text.train.config import TrainConfig
from hrm_text.train.execution import chosen
from hrm_text.train.hooks import CheckpointRecord, Hook, JsonlMetrics, StepRecord
from hrm_text.train.sharding import reduce_scatter
from hrm_text.train.world import World, joined

TIMEOUT_SECONDS = 120


def main(job: dict[str, Any]) -> None:
    """Measure the groups of a job in turn."""
    groups = [tuple(Cell(**cell) for cell in group) for group in job["groups"]]
    with joined(job["device"], TIMEOUT_SECONDS) as world:
        tell(world, made=made_on(job["device"]))
        if groups[0][0].is_run:
            [[cell]] = groups
            tell(world, began=[asdict(cell)])
            trained(cell, job, world)
            return
        initial: dict[str, dict[str, torch.Tensor]] = {}
        for group in groups:
            late = time.time() + group_seconds(group) > job["ends_at"]
            if world.gathered(late)[0]:  # rank 0's clock: all of them stop, or none
                break
            tell(world, began=[asdict(cell) for cell in group])
            began, size = time.perf_counter(), group[0].size
            if group[0].kind == "exchange":
                figures = [exchanges(size, world, job["device"])]
            else:
                if size not in initial:
                    initial.clear()
                    initial[size] = drawn(preset(size), job["device"])
                figures = steps(group, world, job["device"], initial[size])
            for cell, found in zip(group, figures, strict=True):
                tell(world, cell=asdict(cell), figures=found | {"seconds": time.perf_counter() - began})
            gc.collect()  # a sharded model holds itself
            if job["device"] == "cuda":
                torch.cuda.empty_cache()


def tell(world: World, **words: Any) -> None:
    """A line on rank 0's standard output."""
    if world.is_main:
        print(json.dumps(words), flush=True)


def made_on(device: str) -> dict[str, Any]:
    """Machine and versions."""
    found: dict[str, Any] = {"machine": machine(device), "versions": versions()}
    if device == "cuda":
        found["versions"] |= {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def drawn(model: ModelConfig, device: str) -> dict[str, torch.Tensor]:
    """Weights of every rank alike, drawn on the device once for all cells of a size: the CPU takes seconds for them."""
    weights = build(model, seed=None, device=device).state_dict()
    generator = torch.Generator(weights["lm_head.weight"].device).manual_seed(0)
    for weight in weights.values():
        weight.normal_(std=weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1.0, generator=generator)
    return weights


# ------------------------------------------------------------------------------------------------------- steps --


def dtype_on(device: str) -> Any:
    """CPUs multiply bf16 seven times as slowly as fp32: there everything is tried in fp32."""
    return "bfloat16" if device == "cuda" else "float32"


def config_of(cell: Cell, device: Any) -> BenchConfig:
    """As `bench train` has it, every choice made."""
    config = BenchConfig(
        size=cell.size,
        tokens=RECIPES[cell.size].tokens,
        micro_batches=cell.passes,
        sharding=cell.sharding,
        shard_ranks=cell.shard_ranks,
        fp8=cell.precision == "FP8",
        dtype=dtype_on(device),
        device=device,
    )
    return chosen(config, model_of(config))


def steps(group: Sequence[Cell], world: World, device: str, initial: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Figures of cells that take turns with the same GPUs training side by side, which exchange nothing."""
    configs = [config_of(cell, device) for cell in group]
    is_batch = group[0].kind == "batch"
    if world.size > 1 and not is_batch:
        configs.append(replace(configs[0], sharding="none", shard_ranks=None))
    # Reading a profile takes seconds, and those that exchange nothing have nothing to show.
    profiled = [device == "cuda" and config.sharding != "none" and not is_batch for config in configs]
    count, warmup = (BATCH_TIMED, BATCH_WARMUP) if is_batch else (TIMED, WARMUP)
    timings = timed(configs, world, count, warmup, profiled, initial)
    if not timings:
        return [{} for _ in group]
    beside = timings[-1] if len(timings) > len(group) else None
    return [figures_of(timing) | ({"beside": figures_of(beside)} if beside else {}) for timing in timings[: len(group)]]


def figures_of(timing: Timing) -> dict[str, Any]:
    """Those of the table, and what it would take to explain them."""
    values = asdict(timing)
    del values["settings"], values["largest_others"]
    return values


# --------------------------------------------------------------------------------------------------- exchanges --


def exchanges(size: str, world: World, device: str, repeats: int = 10) -> dict[str, Any]:
    """Milliseconds of the collectives of training, with nothing beside them, by what `budget` calls them."""
    model = preset(size)
    units = {"block": model.block_parameters, "head": model.vocab_size * model.hidden_size}
    found = []
    for unit, elements in units.items():
        part = elements // world.size
        for name in ("reduce-scatter", "all-gather", "all-to-all"):
            dtype = torch.float32 if name == "reduce-scatter" else torch.bfloat16
            whole = torch.zeros(part * world.size, device=device, dtype=dtype)
            piece = torch.zeros(part, device=device, dtype=dtype)
            other = torch.zeros_like(whole) if name == "all-to-all" else whole

            def once(name: str = name, whole: Any = whole, piece: Any = piece, other: Any = other) -> None:
                if name == "reduce-scatter":
                    reduce_scatter(piece, whole, dist.ReduceOp.SUM)
                elif name == "all-gather":
                    dist.all_gather_into_tensor(whole, piece)
                else:
                    dist.all_to_all_single(other, whole)

            ms = statistics.median(of_all_ranks(world.gathered(watched(once, device, repeats)), in_step=True))
            found.append({"name": name, "unit": unit, "elements": elements, "bytes": whole.element_size(), "ms": ms})
    return {"exchanges": found}


def watched(once: Callable[[], None], device: str, repeats: int) -> list[float]:
    """Milliseconds of each time after three that do not count."""
    for _ in range(3):
        once()
    watch = Stopwatch(torch.device(device))
    for _ in range(repeats):
        with watch:
            once()
    return watch.milliseconds()


# ---------------------------------------------------------------------------------------------------- a run --


class Watched(Hook):
    """Notes losses and checkpoints, and holds the run up until the first checkpoint is whole: a save that is due before
    that would wait for it, and show how fast the disk is.
    """

    def __init__(self, run: Path, at_the_end: Callable[[], None] = lambda: None) -> None:
        """at_the_end: called after the last step, before it is saved."""
        self.run, self.at_the_end = run, at_the_end
        self.losses: dict[int, float] = {}
        self.saves: list[dict[str, float]] = []

    def on_step(self, record: StepRecord) -> None:
        self.losses[record.step] = record.loss
        if record.step == RUN_STEPS - 2:
            until = time.monotonic() + 0.75 * TIMEOUT_SECONDS
            while not step_folders(self.run / "checkpoints") and time.monotonic() < until:
                time.sleep(0.05)
        if record.step == record.total_steps:
            self.at_the_end()

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self.saves.append({"step": record.step, "stalled": record.stalled_seconds, "whole_after": record.seconds})


def trained(cell: Cell, job: dict[str, Any], world: World) -> None:
    """A run that saves twice, or the second half of one, from the checkpoint in its middle.

    The latter tells its figures before it saves: the launcher waits for no more.
    """
    from hrm_text.train.loop import Trainer  # what steps can do without: tokenizers, Numba

    run = run_folder(Path(job["work"]), cell)
    sampled = run.parent / "sampled"
    with world.main_first():
        if world.is_main and not (sampled / "metadata.json").exists():
            write_samples(sampled, cell.size, cell.gpus)
    settings = {
        "run": str(run),
        "device": job["device"],
        "dtype": dtype_on(job["device"]),
        "model": to_mapping(preset(cell.size)),
        "data": {
            "sampled": str(sampled),
            "tokens_per_batch": RECIPES[cell.size].tokens,
            "micro_batches": cell.gpus,
            "epochs": 1,
        },
        # A rate at which a dozen steps move the loss.
        "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 0}},
        "checkpoint": {"every_steps": SAVED_AT},
        "distributed": {"sharding": "fsdp", "timeout_seconds": TIMEOUT_SECONDS},
        "logging": {"tensorboard": False},
        "max_steps": RUN_STEPS,
    }
    config = from_mapping(TrainConfig, settings, cell.name)

    def tell_all() -> None:
        figures = {"ranks": world.size, "losses": hook.losses, "saves": hook.saves, "sharding": "fsdp"}
        tell(world, cell=asdict(cell), figures=figures)

    hook = Watched(run, tell_all if cell.kind == "resume" else lambda: None)
    Trainer(config, [hook, JsonlMetrics(run / "metrics.jsonl")], world).run()
    if cell.kind == "checkpoint":
        tell_all()


def write_samples(folder: Path, size: str, gpus: int) -> None:
    """A sampled folder of random samples for the run: "anchor" lengths, and frequent and rare tokens as texts have."""
    model, rng = preset(size), np.random.Generator(np.random.Philox(0))
    tokens = RECIPES[size].tokens
    context = min(CONTEXT, tokens // 2, model.max_position_embeddings)
    prefixes, responses, total = [], [], 0
    while total < (RUN_STEPS + 2) * gpus * tokens:
        prefix, response = DISTRIBUTIONS["anchor"](rng)
        prefix = min(prefix, context // 2)
        response = min(response + 1, context - prefix)
        prefixes.append(prefix)
        responses.append(response)
        total += prefix + response
    ids = rng.zipf(1.2, total) % model.vocab_size
    (folder / "epoch_0").mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", ids.astype(np.uint16))
    inst_len, resp_len = np.array(prefixes, np.int64), np.array(responses, np.int64)
    starts = np.concatenate([[0], (inst_len + resp_len).cumsum()[:-1]])
    columns = {"inst_start": starts, "inst_len": inst_len, "resp_start": starts + inst_len, "resp_len": resp_len}
    for name, column in columns.items():
        np.save(folder / "epoch_0" / f"{name}.npy", column)
    info = {"vocab_size": model.vocab_size}
    metadata = {"tokenizer_info": info, "vocab_size": None, "max_seq_len": context + 1, "total_length": total}
    write_json(folder / "metadata.json", metadata)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
