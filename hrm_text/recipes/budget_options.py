"""Other ways to run what does not fit, or to run it faster: each is computed, none is canned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hrm_text.contracts import UserError
from hrm_text.recipes.budget_estimate import Estimate, estimate
from hrm_text.recipes.budget_gpus import Gpu
from hrm_text.recipes.budget_memory import Recompute
from hrm_text.recipes.budget_run import Question, Run, blocks_of
from hrm_text.train.config import TrainConfig


@dataclass(frozen=True)
class Option:
    """Another way to run it, computed like the first."""

    changes: tuple[str, ...]
    """As options of the command line."""
    estimate: Estimate
    note: str = ""


LITTLE = 0.98
"""A change that others would do as well without is left out where it saves less than 2 % of the time."""


def options_for(config: TrainConfig, run: Run, first: Estimate, gpu: Gpu, question: Question) -> tuple[Option, ...]:
    """What fits where the first does not, the cheapest first; where it does, what fits as well and is faster."""
    found: list[Option] = []
    for names, changed, gpus in variations(config, run, first.gpus, gpu):
        factor = changed.data.tokens_per_batch / config.data.tokens_per_batch
        try:
            other = estimate(changed, dataclasses.replace(run, bin=run.bin.times(factor)), gpus, gpu, question)
        except UserError:  # what cannot be had is no option
            continue
        if other.fits:
            found.append(Option(names, other, "costs about 1 % of loss" if changed.fp8 and not config.fp8 else ""))
    if first.fits:
        found = [option for option in found if option.estimate.gpus == first.gpus]
        found = [option for option in found if option.estimate.days < LITTLE * first.days]
    found = [option for option in found if not any(does_as_well(other, option) for other in found)]
    found.sort(key=lambda option: (option.estimate.gpus, option.estimate.days))
    return tuple(found[: 3 if first.fits else 5])


def does_as_well(fewer: Option, option: Option) -> bool:
    """Whether an option with some of the changes of another, and no other change, takes about the same time."""
    return set(fewer.changes) < set(option.changes) and LITTLE * fewer.estimate.days < option.estimate.days


def variations(
    config: TrainConfig, run: Run, gpus: int, gpu: Gpu
) -> Iterator[tuple[tuple[str, ...], TrainConfig, int]]:
    """(options of the command line, the configuration with them, GPUs): one change, and combinations of some."""
    data, blocks = config.data, blocks_of(config, run.model)
    recomputes: Sequence[Recompute] = ("none", "some", "full") if blocks == "fused" else ("none", "full")
    now = config.recompute if config.recompute != "auto" else "some" if blocks == "fused" else "none"
    by_recompute: list[Recompute | None] = [None, *(name for name in recomputes if name != now)]
    longest = run.model.max_position_embeddings
    splits = [1, *(n for n in (2, 4) if data.tokens_per_batch % n == 0 and data.tokens_per_batch // n >= longest)]
    at_onces = sorted({data.at_once, 1, 2 * data.at_once} & set(range(1, -(-data.micro_batches // gpus) + 1)))
    shardings = [None, *(["fsdp"] if gpus > 1 and config.distributed.sharding != "fsdp" else [])]
    more = [gpus, *(n for n in (2 * gpus, 4 * gpus, 8 * gpus) if n <= data.micro_batches)]
    fp8s = [None, *([True] if gpu.float8 and not config.fp8 and blocks == "fused" else [])]
    for recompute, split, at_once, sharding, count, fp8 in itertools.product(
        by_recompute, splits, at_onces, shardings, more, fp8s
    ):
        changed, names = config, []
        new_data = data
        if recompute is not None:
            names.append(f"--recompute {recompute}")
            changed = dataclasses.replace(changed, recompute=recompute)
        if split > 1:
            tokens, bins = data.tokens_per_batch // split, data.micro_batches * split
            names += [f"--data.tokens_per_batch {tokens}", f"--data.micro_batches {bins}"]
            new_data = dataclasses.replace(new_data, tokens_per_batch=tokens, micro_batches=bins)
        if at_once != data.at_once:
            names.append(f"--data.at_once {at_once}")
            new_data = dataclasses.replace(new_data, at_once=at_once)
        if sharding is not None:
            names.append("--distributed.sharding fsdp")
            distributed = dataclasses.replace(changed.distributed, sharding="fsdp", shard_ranks=None)
            changed = dataclasses.replace(changed, distributed=distributed)
        if count != gpus:
            names.append(f"--gpus {count}")
        if fp8:
            names.append("--fp8 true")
            changed = dataclasses.replace(changed, fp8=True)
        if names and len(names) - (split > 1) <= 2:
            yield tuple(names), dataclasses.replace(changed, data=new_data), count
