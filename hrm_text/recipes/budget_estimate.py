"""A run on some number of GPUs: does it fit, how fast is it, what does it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hrm_text.contracts import UserError
from hrm_text.model.config import ModelConfig
from hrm_text.model.plan import plan, training_flops
from hrm_text.recipes.budget_gpus import Gpu
from hrm_text.recipes.budget_memory import Recompute, Setup, peak_memory
from hrm_text.recipes.budget_network import Network
from hrm_text.recipes.budget_run import Question, Run, blocks_of
from hrm_text.recipes.budget_speed import Step, step_time
from hrm_text.recipes.budget_work import Work
from hrm_text.train.config import TrainConfig
from hrm_text.train.sharding import chosen_sharding
from hrm_text.train.world import World

SLACK = 0.03
"""Share of the tensors' memory that the allocator holds beside them. Assumed."""
CONTEXT_GIB, COLLECTIVES_GIB = 0.6, 0.8
"""That the driver and its kernels take, and NCCL with several ranks. Assumed."""
COPY_BYTES_PER_SECOND = 47e9
"""From a GPU to its host, for which the run waits when it saves: 0.2 s for half of an XL run's state, by an H200."""
PIN_BYTES_PER_SECOND = 2e9
"""That a host makes ready for such copies, for which the first save waits as well: 4.9 s in all for the same."""
STATE_BYTES = 16
"""Bytes a parameter in a checkpoint: fp32 weight, two moments, average."""


@dataclass(frozen=True)
class CostOfK:
    """One K of a run."""

    k: int
    share_of_steps: float
    gflop_per_token: float
    """Attention left out; the head counts for the supervised tokens."""
    attention_gflop_per_token: float
    """Visible pairs alone, backward twice the forward."""
    ms: float
    """Of one step."""


@dataclass(frozen=True)
class Checkpoints:
    """What is saved."""

    gib: float
    copy_seconds: float
    """For which the run waits: each GPU copies its share to its host."""
    first_copy_seconds: float
    """The same of the first, for which the host has to get its memory ready."""
    write_seconds: float
    """In the background, all machines at once."""
    count: int
    kept_gib: float
    """On the disk at the end."""


@dataclass(frozen=True)
class Estimate:
    """The run on some number of GPUs."""

    gpus: int
    sharding: str
    """In words."""
    micro_batches: int
    """Of a step, over all GPUs."""
    tokens_per_batch: int
    """Budget of one of them."""
    at_once: int
    """Micro-batches that share one forward pass."""
    passes: int
    """Forward and backward passes of a GPU in one step."""
    recompute: str
    gib_by_part: dict[str, float]
    """Of one GPU, at the moment of the most."""
    gib: float
    """All of it: tensors, the allocator's slack, the driver."""
    gpu_gib: float
    ms_by_part: dict[str, float]
    """Of one step at the largest K."""
    costs: tuple[CostOfK, ...]
    step_ms: float
    """Mean over the run."""
    exposed_ms: float
    """Of exchange that the computing waits for, at the largest K."""
    exchange_ms: float
    """All of it."""
    sent_gib: float
    """That each GPU sends in one step."""
    waits_for_host: bool
    """Whether the host cannot launch as fast as the device computes."""
    tokens_per_second: float
    """Of all GPUs together, mean over the run."""
    mfu: float
    """Mean over the run, attention left out."""
    steps: int
    tokens: float
    days: float
    dollars: float
    checkpoints: Checkpoints

    @property
    def fits(self) -> bool:
        return self.gib <= self.gpu_gib


def estimate(config: TrainConfig, run: Run, gpus: int, gpu: Gpu, question: Question) -> Estimate:
    """The run on ``gpus`` of a kind."""
    model, data = run.model, config.data
    local = min(gpus, question.gpus_per_node)
    if gpus % local:
        raise UserError(f"--gpus: {gpus} GPUs are no whole machines of {local}; take a multiple, or --gpus-per-node")
    blocks = blocks_of(config, model)
    recompute: Recompute = "some" if blocks == "fused" else "none"
    if config.recompute != "auto":
        recompute = config.recompute
    if recompute == "some" and blocks != "fused":
        raise UserError("recompute: compiled blocks know none and full; 'some' needs fused blocks")
    sharding, shards = "one process", 1
    if gpus > 1:
        world = World(size=gpus, local_size=local)
        chosen = chosen_sharding(config.distributed, model, world, int(gpu.memory_gib * 2**30))
        sharding, shards = chosen.kind, chosen.shards
    bins_of_rank = -(-data.micro_batches // gpus)
    at_once = min(data.at_once, bins_of_rank)
    passes = -(-bins_of_rank // at_once)
    setup = Setup(model, blocks, recompute, config.fp8, passes, gpus, local, shards)
    work, step_work = run.bin.times(at_once), run.bin.times(data.micro_batches)
    network = Network(gpu.link_bytes_per_second, question.network_gbps / 8 * 1e9)

    times: dict[int, Step] = {k: step_time(setup, k, work, gpu, network) for k in run.share_by_k}
    largest = max(times)
    mean = sum(share * times[k].seconds for k, share in run.share_by_k.items())
    flops = {k: training_flops(model, k, round(step_work.tokens), round(step_work.supervised)) for k in times}
    mean_flops = sum(share * flops[k] for k, share in run.share_by_k.items())
    costs = tuple(
        CostOfK(
            k=k,
            share_of_steps=share,
            gflop_per_token=flops[k] / step_work.tokens / 1e9,
            attention_gflop_per_token=attention_flops(model, k, step_work) / step_work.tokens / 1e9,
            ms=1e3 * times[k].seconds,
        )
        for k, share in run.share_by_k.items()
    )
    steps = max(1, math.ceil(run.tokens / step_work.tokens - 1e-6))
    saved = checkpoints_of(config, model, steps, mean, gpus, question)
    seconds = steps * mean + saved.first_copy_seconds + (saved.count - 1) * saved.copy_seconds
    tensors = peak_memory(setup, largest, work)
    gib = {part: value / 2**30 for part, value in tensors.items() if value}
    beside = SLACK * sum(gib.values()) + CONTEXT_GIB + (COLLECTIVES_GIB if gpus > 1 else 0)
    gib["allocator, driver"] = beside
    return Estimate(
        gpus=gpus,
        sharding=sharding if shards in (1, gpus) else f"{sharding}, {gpus // shards} copies over {shards} each",
        micro_batches=data.micro_batches,
        tokens_per_batch=data.tokens_per_batch,
        at_once=at_once,
        passes=passes,
        recompute=recompute,
        gib_by_part=gib,
        gib=sum(gib.values()),
        gpu_gib=gpu.memory_gib,
        ms_by_part={name: 1e3 * value for name, value in times[largest].parts.items()},
        costs=costs,
        step_ms=1e3 * mean,
        exposed_ms=1e3 * times[largest].exchange.exposed,
        exchange_ms=1e3 * times[largest].exchange.total,
        sent_gib=times[largest].exchange.sent_bytes / 2**30,
        waits_for_host=times[largest].waits_for_host,
        tokens_per_second=steps * step_work.tokens / seconds,
        mfu=mean_flops * steps / seconds / (gpus * gpu.peak),
        steps=steps,
        tokens=run.tokens,
        days=seconds / 86_400,
        dollars=seconds / 3600 * gpus * question.price,
        checkpoints=saved,
    )


def checkpoints_of(
    config: TrainConfig, model: ModelConfig, steps: int, step_seconds: float, gpus: int, question: Question
) -> Checkpoints:
    """Size, time and number of a run's checkpoints."""
    size = STATE_BYTES * model.num_parameters
    saving, machines = config.checkpoint, -(-gpus // question.gpus_per_node)
    every = [] if saving.every_steps is None else [saving.every_steps]
    if saving.every_minutes is not None:
        every.append(max(1, round(60 * saving.every_minutes / step_seconds)))
    count = -(-steps // min(every)) if every else 1
    kept = min(count, saving.keep_last) + (steps // saving.keep_every if saving.keep_every else 0)
    return Checkpoints(
        gib=size / 2**30,
        copy_seconds=size / gpus / COPY_BYTES_PER_SECOND,
        first_copy_seconds=size / gpus * (1 / COPY_BYTES_PER_SECOND + 1 / PIN_BYTES_PER_SECOND),
        write_seconds=size / machines / (question.disk_gb_per_second * 1e9),
        count=count,
        kept_gib=kept * size / 2**30,
    )


def attention_flops(model: ModelConfig, k: int, work: Work) -> float:
    """Of attention for some work: 4 operations a visible pair and number of a head forward, twice that backward."""
    calls = sum(3 if step.grad else 1 for step in plan(model, k)) * model.layers_per_stack
    return 4 * model.attention_size * work.pairs * calls
