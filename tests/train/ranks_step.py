"""What the ranks of a step are checked for, run by test_ranks.py: one line of JSON of rank 0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hrm_text.contracts import IGNORE_INDEX, PackedBatch
from hrm_text.data.loader import LoaderStep
from hrm_text.model.config import preset
from hrm_text.settings import from_mapping
from hrm_text.train.config import ExecutionConfig, OptimizerConfig
from hrm_text.train.execution import chosen
from hrm_text.train.sharding import Sharding
from hrm_text.train.step import TrainingStep
from hrm_text.train.world import World, joined

MODEL = preset("tiny", vocab_size=256)
OPTIMIZER = from_mapping(OptimizerConfig, {"lr": {"peak": 1e-3, "warmup_steps": 0}, "ema_decay": 0.9}, "test")
KS = [2, 3, 5, 4, 5, 5]
NOBODY = PackedBatch(*(np.zeros(0, np.int64),) * 3, np.zeros(1, np.int64), np.zeros(0, np.int64))


def random_batch(seed: int) -> PackedBatch:
    rng = np.random.Generator(np.random.Philox(seed))
    prefixes, responses = rng.integers(1, 9, 3), rng.integers(1, 9, 3)
    lengths = prefixes + responses
    starts = np.concatenate([[0], lengths.cumsum()])
    labels = rng.integers(0, 256, starts[-1])
    for start, prefix in zip(starts[:-1], prefixes, strict=True):
        labels[start : start + prefix - 1] = IGNORE_INDEX
    positions = np.concatenate([np.arange(length) for length in lengths])
    return PackedBatch(rng.integers(0, 256, starts[-1]), labels, positions, starts, prefixes)


def trained(world: World, sharding: Sharding | None, dtype: Any, micro_batches: int, poison: int | None = None) -> Any:
    """Numbers of each step, validation and state after some steps on the same global batches."""
    execution = chosen(ExecutionConfig(device="cpu", dtype=dtype), MODEL)
    step = TrainingStep(MODEL, OPTIMIZER, execution, seed=3, sharding=sharding)
    rank, ranks = (0, 1) if sharding is None else (world.rank, world.size)
    numbers = []
    for index, k in enumerate(KS):
        batches = [random_batch(100 * index + j) for j in range(micro_batches)]
        if index == 2:
            batches.pop()
        supervised = sum(batch.num_supervised for batch in batches)
        if sharding is not None and index == 2:
            batches.append(NOBODY)
        if index == poison and world.rank == ranks - 1:
            with torch.no_grad():
                supervised = 1
                step.model.model.z_L_init.fill_(float("nan"))
        wishes = (index == 4 and world.rank == world.size - 1, False)
        numbers.append(step.run(LoaderStep(batches[rank::ranks], supervised, 0, 0), k, 1e-3, wishes).tolist())
        if index == poison and world.rank == ranks - 1:
            step.model.model.z_L_init.copy_(TrainingStep(MODEL, OPTIMIZER, execution, seed=3).model.model.z_L_init)
    with step.averaged_weights():
        totals = step.evaluate([random_batch(1000 + j) for j in range(micro_batches)][rank::ranks])
    state = {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in step.state().items()
    }
    return numbers, totals.mean_loss, state


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Over all tensors, relative to the largest number of each."""
    assert ours.keys() == theirs.keys()
    return max(
        float(
            (ours[name].double() - theirs[name].double()).abs().max() / theirs[name].double().abs().max().clamp(1e-30)
        )
        for name in ours
    )


def main(sharded: Sequence[str]) -> None:
    report: dict[str, Any] = {}
    with joined("cpu", 60) as world:
        kinds = {
            "fsdp": Sharding("fsdp", 1, world.size, ""),
            "ddp": Sharding("ddp", world.size, 1, ""),
            "hsdp": Sharding("hsdp", world.size // 2, 2, ""),
        }
        for kind in sharded:
            for micro_batches in (world.size, 2 * world.size):
                alone = trained(world, None, "float32", micro_batches)
                ranks = trained(world, kinds[kind], "float32", micro_batches)
                report[f"{kind} {micro_batches}"] = {
                    "numbers": [
                        float(np.abs(np.array(a)[:6] - np.array(b)[:6]).max())
                        for a, b in zip(alone[0], ranks[0], strict=True)
                    ],
                    "finite": [row[5] for row in ranks[0]],
                    "wishes": [row[6:] for row in ranks[0]],
                    "validation": abs(alone[1] - ranks[1]),
                    "state": largest_difference(ranks[2], alone[2]),
                }
        # bf16 on the wire, fp32 sums: the same as a reduction of fp32 gradients, which two micro-batches make.
        alone = trained(world, None, "bfloat16", world.size)
        half = trained(world, kinds["fsdp"], "bfloat16", world.size)
        report["bf16"] = {"numbers": max(abs(a[0] - b[0]) / a[0] for a, b in zip(alone[0], half[0], strict=True))}
        poisoned = trained(world, kinds["fsdp"], "float32", world.size, poison=3)
        report["poisoned"] = {"finite": [row[5] for row in poisoned[0]], "step": int(poisoned[2]["step"])}
        if world.is_main:
            print(json.dumps(report))
