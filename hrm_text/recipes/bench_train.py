"""How fast a machine trains: steps of a named size on random weights and samples, two configurations in turns."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from hrm_text.contracts import IGNORE_INDEX, PackedBatch, UserError
from hrm_text.data.loader import LoaderStep
from hrm_text.model.attention import Spans
from hrm_text.model.config import Architecture, ModelConfig, preset
from hrm_text.model.plan import plan, training_flops
from hrm_text.recipes.bench_attention import visible_pairs
from hrm_text.recipes.step_profile import StepProfile, profile_step
from hrm_text.recipes.stopwatch import Stopwatch
from hrm_text.recipes.synthetic import synthetic_spans
from hrm_text.settings import from_mapping, settings, to_mapping
from hrm_text.train.config import Count, DistributedConfig, ExecutionConfig, OptimizerConfig
from hrm_text.train.execution import chosen, device_name
from hrm_text.train.metrics import device_memory_bytes, device_memory_total, peak_flops
from hrm_text.train.schedule import LearningRate
from hrm_text.train.sharding import Sharding, chosen_sharding
from hrm_text.train.step import TrainingStep
from hrm_text.train.world import World, joined

NUM_BATCHES = 4
"""Different batches that take turns: a kernel that is compiled anew for each, or waits for it, must show."""

NUM_SEEDS = 64
"""Batches drawn, of which the NUM_BATCHES with the most typical attention are taken. One long sample has more pairs
than all others together: of XL's 12,288 tokens by "anchor", attention takes 21 to 81 GFLOP, and 31 in the median."""


@settings
class BenchConfig(ExecutionConfig):
    """One configuration to time."""

    size: str = "XL"
    """Named size of the model."""
    architecture: Architecture = "hrm"
    """Which plan of module calls."""
    tokens: Count = 12_288
    """Token budget of a step."""
    k: Count | None = None
    """Module calls that carry gradient; null is the architecture's own number."""
    distribution: str = "anchor"
    """Lengths of the samples: a name of synthetic.DISTRIBUTIONS."""
    micro_batches: Count = 1
    """Micro-batches of ``tokens`` that each rank takes in a step."""
    sharding: Literal["auto", "ddp", "fsdp", "hsdp", "none"] = "auto"
    """What ranks share, where there are several. none: they train side by side and exchange nothing."""
    shard_ranks: Count | None = None
    """hsdp: ranks that share one copy."""


@dataclass(frozen=True)
class Timing:
    """What was measured of one configuration."""

    settings: dict[str, Any]
    """Every choice made."""
    device: str
    tokens_per_second: float
    """Tokens that belong to samples over the time of a step, the median."""
    budget_per_second: float
    """The token budget over the median time of a step: what a system that pads its batches would count."""
    ranks: int
    """Rates are of one rank; all of them together are so many times as fast."""
    sharding: str | None
    """What the ranks share; None: there is one, or they exchange nothing."""
    product_flops: float | None
    """FLOP/s of a bf16 matrix product of size 8,192 right after the timed steps, on a GPU as hot as they left it."""
    mfu: float | None
    """By the plan's FLOPs and the device's bf16 peak, 0 to 1; None where that is not known."""
    step_ms: float
    """The median."""
    step_ms_min: float
    step_ms_max: float
    peak_bytes: int
    """The most memory of a step: tensors of this configuration alone on CUDA, the whole process elsewhere."""
    seconds_to_first_step: float
    """From nothing to the end of the first step: weights, compilation and all."""
    seconds_to_build: float
    """Of these, until the weights had been drawn."""
    steps: int
    supervised_per_step: float
    tokens_per_step: float
    """Mean over the batches."""
    attention_flops_per_step: float
    """Of one layer's attention forward, visible pairs alone; mean over the batches."""
    ms_by_part: dict[str, float] | None = None
    """Of one profiled step, which takes a little longer."""
    hidden_communication_ms: float | None = None
    """Of exchanges between ranks while other kernels ran; in the profiled step."""
    largest_others: list[str] | None = None
    """The kernels that took the most of the part "other"."""


def bench_train(
    config: BenchConfig, compare: Sequence[str] = (), steps: int = 10, warmup: int = 3, parts: bool = False
) -> list[Timing]:
    """Time ``steps`` training steps after ``warmup`` others.

    ``compare``: KEY=VALUE, settings in which a second configuration differs; the two then take turns, step by step.
    ``parts``: profile one more step of each (CUDA).
    Under torchrun all ranks take part, each on batches of its own; rank 0 gets the result, the others an empty list.
    Raises UserError for settings that cannot be had, and where the memory does not suffice.
    """
    for name, number in (("steps", steps), ("warmup", warmup)):
        if number < 1:
            raise UserError(f"{name}: expected at least 1, found {number}")
    configs = [config, *([compared(config, compare)] if compare else [])]
    configs = [chosen(one, model_of(one)) for one in configs]
    for one in configs:
        plan(model_of(one), one.k)  # raises where K is out of range, before anything is built
    if parts and any(one.device != "cuda" for one in configs):
        raise UserError("parts: kernels are profiled on CUDA alone; leave --parts out")
    device = configs[0].device
    assert device != "auto"
    with joined(device, timeout_seconds=300) as world:
        return timed(configs, world, steps, warmup, [parts] * len(configs))


def timed(
    configs: Sequence[BenchConfig],
    world: World,
    steps: int,
    warmup: int,
    parts: Sequence[bool],
    initial: Mapping[str, torch.Tensor] | None = None,
) -> list[Timing]:
    """Any number of configurations in turns, step by step, by ranks that have met; rank 0 gets the result.

    configs: in which every choice is made. parts: of which of them one more step is profiled. initial: weights of all
    of them, in the place of drawing them for each.
    """
    with memory_may_not_suffice(configs):
        contenders = [Contender(one, warmup, world, initial) for one in configs]
        own_times = timed_in_turns(contenders, steps)
        times = [
            of_all_ranks([times[index] for times in world.gathered(own_times)], contender.sharding is not None)
            for index, contender in enumerate(contenders)
        ]
        rate = product_flops(contenders[0].training.device)
        profiles = [profile_step(each.step) if wanted else None for each, wanted in zip(contenders, parts, strict=True)]
    if not world.is_main:
        return []
    return [c.timing(ms, rate, found) for c, ms, found in zip(contenders, times, profiles, strict=True)]


def compared(config: BenchConfig, changes: Sequence[str]) -> BenchConfig:
    """The second configuration: ``config`` with KEY=VALUE changed."""
    values = to_mapping(config)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--compare: expected KEY=VALUE, such as blocks=compiled, found {change!r}")
        values[key.replace("-", "_")] = value
    return from_mapping(BenchConfig, values, "--compare")


def model_of(config: BenchConfig) -> ModelConfig:
    """The model of a configuration."""
    return preset(config.size, architecture=config.architecture)


class Contender:
    """One configuration, its weights and its batches, warmed up; knows how much memory it takes alone."""

    def __init__(
        self,
        config: BenchConfig,
        warmup: int,
        world: World,
        initial: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.config, self.model, self.world = config, model_of(config), world
        self.k = config.k or self.model.bp_steps
        on_cuda = config.device == "cuda"
        held_by_others = torch.cuda.memory_allocated() if on_cuda else 0
        started = time.perf_counter()
        optimizer = OptimizerConfig(lr=LearningRate(peak=1e-4))
        self.sharding = sharding_of(config, self.model, world)
        self.training = TrainingStep(self.model, optimizer, config, sharding=self.sharding, initial=initial)
        self.seconds_to_build = time.perf_counter() - started
        # As the packing of a real run does, every rank gets about the same work.
        seeds = typical_seeds(config, NUM_BATCHES * config.micro_batches * world.size)[world.rank :: world.size]
        micro_batches = [synthetic_batch(config, self.model.vocab_size, seed) for seed in seeds]
        self.batches = [
            together(micro_batches[start : start + config.micro_batches], 1 if self.sharding is None else world.size)
            for start in range(0, len(micro_batches), config.micro_batches)
        ]
        pairs = statistics.mean(visible_pairs(spans_of(config, seed)) for seed in seeds)
        self.attention_flops = 4 * self.model.head_dim * self.model.num_heads * pairs
        self.turns: Iterator[LoaderStep] = itertools.cycle(self.batches)
        self.step().tolist()  # waits
        self.seconds_to_first_step = time.perf_counter() - started
        for _ in range(warmup - 1):
            self.step()
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            for _ in self.batches:
                self.step()
            torch.cuda.synchronize()
        self.peak_bytes = device_memory_bytes(self.training.device) - held_by_others
        self.training.optimizer.zero_grad()

    def step(self) -> torch.Tensor:
        """Launch one step on the next batch."""
        return self.training.run(next(self.turns), self.k, lr=1e-4)

    def timing(self, step_ms: list[float], rate: float | None, profile: StepProfile | None) -> Timing:
        """The report, from the milliseconds of each timed step."""
        count, median = len(self.batches), statistics.median(step_ms)
        tokens = sum(batch.tokens for batch in self.batches) / count
        supervised = sum(batch.supervised for batch in self.batches) / count
        supervised /= 1 if self.sharding is None else self.world.size
        peak = peak_flops(self.training.device, self.training.dtype)
        flops = training_flops(self.model, self.k, round(tokens), round(supervised))
        return Timing(
            settings=to_mapping(self.config) | {"k": self.k},
            device=device_name(self.config.device),
            tokens_per_second=tokens / median * 1e3,
            budget_per_second=self.config.tokens * self.config.micro_batches / median * 1e3,
            ranks=self.world.size,
            sharding=None if self.sharding is None else str(self.sharding),
            product_flops=rate,
            mfu=flops / (median / 1e3) / peak if peak is not None else None,
            step_ms=median,
            step_ms_min=min(step_ms),
            step_ms_max=max(step_ms),
            peak_bytes=self.peak_bytes,
            seconds_to_first_step=self.seconds_to_first_step,
            seconds_to_build=self.seconds_to_build,
            steps=len(step_ms),
            supervised_per_step=supervised,
            tokens_per_step=tokens,
            attention_flops_per_step=self.attention_flops,
            ms_by_part=profile.ms_by_part if profile else None,
            hidden_communication_ms=profile.hidden_communication_ms if profile else None,
            largest_others=profile.largest_others if profile else None,
        )


def timed_in_turns(contenders: Sequence[Contender], rounds: int) -> list[list[float]]:
    """Milliseconds of each round of each contender: A, B, A, B, ... On CUDA the host launches ahead all the while."""
    watches = [Stopwatch(contender.training.device) for contender in contenders]
    for _ in range(rounds):
        for contender, watch in zip(contenders, watches, strict=True):
            with watch:
                contender.step()
    return [watch.milliseconds() for watch in watches]


def of_all_ranks(of_ranks: Sequence[Sequence[float]], in_step: bool) -> list[float]:
    """Milliseconds of each step from those that each rank measured.

    Ranks in step end a step together, and the one that began it last measured the step and no waiting. Ranks that
    train side by side have times of their own: the harmonic mean is that of their mean rate.
    """
    combine = min if in_step else statistics.harmonic_mean
    return [combine(ms) for ms in zip(*of_ranks, strict=True)]


def spans_of(config: BenchConfig, seed: int) -> Spans:
    """Where the samples of a batch lie."""
    return synthetic_spans(config.distribution, config.tokens, seed)


def typical_seeds(config: BenchConfig, count: int = NUM_BATCHES) -> list[int]:
    """Of NUM_SEEDS seeds (4 for each that is wanted if that is more), those whose visible pairs are nearest to the
    median.
    """
    drawn = max(NUM_SEEDS, 4 * count)
    pairs = [visible_pairs(spans_of(config, seed)) for seed in range(drawn)]
    median = statistics.median(pairs)
    return sorted(range(drawn), key=lambda seed: abs(pairs[seed] - median))[:count]


def sharding_of(config: BenchConfig, model: ModelConfig, world: World) -> Sharding | None:
    """What the ranks share; None where they exchange nothing."""
    if world.size == 1 or config.sharding == "none":
        return None
    asked = DistributedConfig(sharding=config.sharding, shard_ranks=config.shard_ranks)
    return chosen_sharding(asked, model, world, device_memory_total(torch.device(config.device)))


def together(micro_batches: Sequence[LoaderStep], ranks: int) -> LoaderStep:
    """One step of several micro-batches; all ranks are taken to have as many tokens."""
    return LoaderStep(
        batches=[batch for step in micro_batches for batch in step.batches],
        supervised=ranks * sum(step.supervised for step in micro_batches),
        samples=ranks * sum(step.samples for step in micro_batches),
        tokens=sum(step.tokens for step in micro_batches),
    )


def product_flops(device: torch.device, size: int = 8192, repeats: int = 10) -> float | None:
    """What the matrix units of a GPU reach in bf16 on random numbers; None on other devices.

    A GPU at its power limit clocks lower than its data sheet says, and two of one kind differ: this is the measure to
    compare across them.
    """
    if device.type != "cuda":
        return None
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    watch = Stopwatch(device)
    for _ in range(repeats):
        with watch:
            torch.mm(a, b)
    return float(2 * size**3 / (statistics.median(watch.milliseconds()) / 1e3))


def synthetic_batch(config: BenchConfig, vocab_size: int, seed: int) -> LoaderStep:
    """Samples of random ids, supervised on their responses; padded only where the trainer pads."""
    spans = spans_of(config, seed)
    rng = np.random.Generator(np.random.Philox(seed))
    starts, prefixes = spans.starts.numpy(), spans.prefix_lengths.numpy()
    lengths, filled = np.diff(starts), int(starts[-1])
    size = config.tokens if config.attention == "flex" else filled
    positions = np.zeros(size, np.int64)
    positions[:filled] = np.arange(filled) - np.repeat(starts[:-1], lengths)
    labels = np.full(size, IGNORE_INDEX, np.int64)
    # The last token of a prefix predicts the first of its response.
    answered = positions[:filled] >= np.repeat(prefixes - 1, lengths)
    labels[:filled][answered] = rng.integers(0, vocab_size, int(answered.sum()))
    batch = PackedBatch(rng.integers(0, vocab_size, size), labels, positions, starts, prefixes)
    return LoaderStep([batch], batch.num_supervised, batch.num_samples, filled)


@contextlib.contextmanager
def memory_may_not_suffice(configs: Sequence[BenchConfig]) -> Iterator[None]:
    """Running out of memory is an error that says what would take less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        alone = ", or time one configuration at a time" if len(configs) > 1 else ""
        raise UserError(
            f"{' and '.join(f'{c.size} at {c.tokens:,} tokens (recompute {c.recompute})' for c in configs)}: "
            f"the memory of {device_name(configs[0].device)} does not suffice. "
            f"Take --recompute full, fewer --tokens or a smaller --size{alone}."
        ) from error


def as_table(timings: Sequence[Timing]) -> Table:
    """A column for each configuration, and for two of them the ratio of the second to the first."""
    table = Table("", *(_title(timing, timings) for timing in timings), *(["ratio"] if len(timings) == 2 else []))
    rows: list[tuple[str, str, list[float | None]]] = [
        ("tokens/s", "{:,.0f}", [t.tokens_per_second for t in timings]),
        ("tokens/s, padding counted", "{:,.0f}", [t.budget_per_second for t in timings]),
        ("  of all ranks", "{:,.0f}", [t.budget_per_second * t.ranks for t in timings]),
        ("MFU", "{:.1%}", [t.mfu for t in timings]),
        ("TFLOP/s of a bf16 product", "{:,.0f}", [t.product_flops and t.product_flops / 1e12 for t in timings]),
        ("ms per step, median", "{:,.1f}", [t.step_ms for t in timings]),
        ("  least", "{:,.1f}", [t.step_ms_min for t in timings]),
        ("  most", "{:,.1f}", [t.step_ms_max for t in timings]),
        ("GFLOP of one attention, forward", "{:,.3g}", [t.attention_flops_per_step / 1e9 for t in timings]),
        ("peak GiB", "{:,.1f}", [t.peak_bytes / 2**30 for t in timings]),
        ("seconds to the first step", "{:,.1f}", [t.seconds_to_first_step for t in timings]),
        ("  of which drawing weights", "{:,.1f}", [t.seconds_to_build for t in timings]),
    ]
    parts = [t.ms_by_part for t in timings if t.ms_by_part is not None]
    for part in parts[0] if parts else []:
        rows.append((f"ms, {part}", "{:,.1f}", [ms[part] for ms in parts]))
    if any(timing.hidden_communication_ms for timing in timings):
        hidden = [timing.hidden_communication_ms for timing in timings]
        rows.append(("ms, communication, hidden (beside the others)", "{:,.1f}", hidden))
    for name, form, values in rows:
        shown = ["-" if value is None else form.format(value) for value in values]
        if len(values) == 2:
            first, second = values
            shown.append(f"{second / first:.2f}" if first and second is not None else "-")
        table.add_row(name, *shown)
    for timing in timings:
        for name in timing.largest_others or ():
            table.add_row("  other:", name)
    return table


def _title(timing: Timing, timings: Sequence[Timing]) -> str:
    """The settings in which configurations differ; of one alone, those that matter most."""
    shown = ["size", "tokens", "k", "dtype", "blocks", "attention", "recompute"]
    if timings[0].ranks > 1:
        shown += ["sharding"]
    if len(timings) > 1:
        differing = [key for key in timing.settings if len({str(t.settings[key]) for t in timings}) > 1]
        shown = differing or shown
    return "\n".join(f"{key} {timing.settings[key]}" for key in shown)
