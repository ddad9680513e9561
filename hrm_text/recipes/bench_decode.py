"""How fast a machine answers: the engine on random weights and prompts, beside Transformers if asked."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.table import Table

from hrm_text.contracts import UserError
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.memory import bytes_per_token, cache_tokens
from hrm_text.infer.requests import Decode, Request
from hrm_text.model.config import Architecture, preset
from hrm_text.model.kernels import packed_attention, pick_backend
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.model.weights import parse_dtype
from hrm_text.recipes.decode_loads import (
    Mixture,
    RandomModel,
    RandomRequests,
    RandomText,
    drained,
    engine_steps,
    mixed_window,
    steady,
    warm_up,
)
from hrm_text.recipes.stopwatch import Stopwatch
from hrm_text.recipes.synthetic import synthetic_spans
from hrm_text.recipes.transformers_steps import Theirs
from hrm_text.settings import from_mapping, settings, to_mapping
from hrm_text.train.config import Count
from hrm_text.train.execution import available_device, device_name, why_not_fused
from hrm_text.train.metrics import device_memory_bytes

SHOWN = ("size", "architecture", "prompt", "dtype")


@settings
class DecodeConfig:
    """One model to time, and the load."""

    size: str = "XL"
    """Named size of the model."""
    architecture: Architecture = "hrm"
    """Which plan of module calls."""
    prompt: Count = 256
    """Tokens of each prompt."""
    steps: Count = 64
    """Timed decoding steps."""
    warmup: Count = 8
    """Steps before the clock starts."""
    mixed_steps: Count = 2000
    """Steps over which texts that come and go are measured."""
    quantize: Literal["none", "int8"] = "none"
    """Weights of the blocks."""
    kv_cache: Literal["auto", "int8"] = "auto"
    """Keys and values: auto is the model's dtype."""
    decode: Decode = "auto"
    """How steps are computed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA where there is one, then MPS, then the CPU."""


@dataclass(frozen=True)
class DecodeTiming:
    """What was measured of one batch size."""

    system: str
    """hrm-text or transformers."""
    settings: dict[str, Any]
    device: str
    batch: int
    step_ms: float
    """From one token of every text to the next, the median."""
    tokens_per_second: float
    """Of the whole batch."""
    step_ms_min: float | None = None
    step_ms_max: float | None = None
    floor_ms: float | None = None
    """Bytes that a step must read (weights at every call, keys and values, head) at the rate of a device copy."""
    prefill_ms: float | None = None
    """All prompts into the cache, up to the first token."""
    prompt_tokens_per_second: float | None = None
    forward_tokens_per_second: float | None = None
    """Of a training step's forward pass (see ``forward_rate``)."""
    prompts_share_of_forward: float | None = None
    seconds_to_first_token: float | None = None
    """From weights in memory to the second token of the first batch: cache, kernels, recordings, prompts, a step."""
    peak_bytes: int | None = None


@dataclass(frozen=True)
class MixedTiming:
    """What was measured of texts that come and go, beside a batch that does neither."""

    settings: dict[str, Any]
    device: str
    texts: int
    """In flight, all through the window."""
    response_lengths: tuple[int, int]
    """Tokens; each number between is as likely."""
    steps: int
    """Of the window."""
    joined: int
    """Texts that ended in it, each followed by another."""
    preemptions: int
    """More than none: the cache was too small, and the time is that of computing things twice."""
    mean_context: float
    """Tokens of a text, over all texts and steps."""
    tokens_per_second: float
    """New ones in the window; the time is everything, prompts included."""
    steady_tokens_per_second: float
    """Of as many texts that all have the mean context, none of which ends; their prompts are not counted as time."""
    share_of_steady: float
    drained_tokens: int
    """New ones of exactly so many texts that begin together, none following one that ends."""
    drained_seconds: float
    """From their first prompt to the last token."""
    drained_tokens_per_second: float
    drained_share_of_steady: float


def bench_decode(
    config: DecodeConfig, batches: Sequence[int], vs: str | None = None, mixed: int | None = None
) -> tuple[list[DecodeTiming], MixedTiming | None]:
    """Time steady decoding at each batch size, and ``mixed`` texts that come and go, if a number is given.

    ``vs`` "transformers": the same weights there as well, size by size.

    Raises:
        UserError: a batch below 1, an unknown system, a device that is not there, too little memory.
    """
    if bad := [batch for batch in batches if batch < 1]:
        raise UserError(f"batch: expected at least 1, found {bad[0]}")
    if mixed is not None and mixed < 1:
        raise UserError(f"mixed: expected at least 1 text, found {mixed}")
    if vs not in (None, "transformers"):
        raise UserError(f"vs: unknown system {vs!r}; there is transformers")
    device = torch.device(available_device(config.device))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.dtype != "auto":
        dtype = parse_dtype(config.dtype)
    config = from_mapping(
        DecodeConfig,
        to_mapping(config) | {"device": device.type, "dtype": str(dtype).removeprefix("torch.")},
        "bench decode",
    )
    module = build(preset(config.size, architecture=config.architecture), device=str(device), dtype=dtype).eval()
    module.requires_grad_(False)
    timings = []
    theirs = Theirs(module, dtype, device) if vs else None
    if config.quantize == "int8":
        from hrm_text.model.quantized import quantize_weights

        quantize_weights(module)
    model = RandomModel(module, RandomText())
    rate = copy_rate(device)
    for batch in batches:
        timings.append(time_engine(config, model, batch, device, rate))
        if theirs is not None:
            timings.append(time_theirs(config, theirs, batch))
    # After the engines: they have prepared the blocks, and paid for the kernels that are made on first use.
    forward = forward_rate(module, device) if batches else None
    timings = [
        replace(t, forward_tokens_per_second=forward, prompts_share_of_forward=t.prompt_tokens_per_second / forward)
        if t.prompt_tokens_per_second is not None and forward is not None
        else t
        for t in timings
    ]
    return timings, time_mixed(config, model, mixed, device) if mixed is not None else None


def time_engine(
    config: DecodeConfig, model: RandomModel, batch: int, device: torch.device, rate: float
) -> DecodeTiming:
    """One batch size, by the engine: from its making to the last token."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    new = config.warmup + config.steps + 2
    engine = DecodingEngine(
        model,
        max_batch=batch,
        cache_tokens=batch * (config.prompt + new + 64),
        kv_cache=config.kv_cache,
        decode=config.decode,
    )
    list(engine_steps(engine, requests_of(config, batch, new=2, seed=1)))
    seconds_to_first = time.perf_counter() - started
    prefills = []
    for seed in (2, 4, 5) if device.type == "cuda" else (2,):
        asked = requests_of(config, batch, new=1, seed=seed)
        before = time.perf_counter()
        list(engine_steps(engine, asked))  # the prompts' pass makes the first token
        prefills.append(1e3 * (time.perf_counter() - before))
    prefill_ms = statistics.median(prefills)
    steps = engine_steps(engine, requests_of(config, batch, new=new, seed=3))
    at = [time.perf_counter() for _ in steps][config.warmup :]
    ms = [1e3 * (after - earlier) for earlier, after in itertools.pairwise(at)][: config.steps]
    median = statistics.median(ms)
    tokens = config.prompt + config.warmup + config.steps // 2
    return DecodeTiming(
        system="hrm-text",
        settings=shown_settings(config, engine),
        device=device_name(device.type),
        batch=batch,
        step_ms=median,
        step_ms_min=min(ms),
        step_ms_max=max(ms),
        tokens_per_second=batch / median * 1e3,
        floor_ms=1e3 * step_bytes(model, batch * tokens, engine.cache.keys.dtype) / rate,
        prefill_ms=prefill_ms,
        prompt_tokens_per_second=batch * config.prompt / prefill_ms * 1e3,
        seconds_to_first_token=seconds_to_first,
        peak_bytes=device_memory_bytes(device),
    )


def time_mixed(config: DecodeConfig, model: RandomModel, texts: int, device: torch.device) -> MixedTiming:
    """Texts that come and go, those that only go, and as many that do neither, by one engine."""
    if device.type == "cuda":  # the memory of engines that are no longer there counts as taken otherwise
        gc.collect()
        torch.cuda.empty_cache()
    mixture = Mixture.within(model.config.max_position_embeddings, config.prompt)
    dtype = torch.int8 if config.kv_cache == "int8" else model.module.lm_head.weight.dtype
    # No more than they can have, so that memory which is not needed is not even filled with zeros.
    most = texts * (config.prompt + mixture.longest + 64)
    engine = DecodingEngine(
        model,
        max_batch=texts,
        cache_tokens=min(most, cache_tokens(model.config, dtype, device, texts)),
        kv_cache=config.kv_cache,
        decode=config.decode,
    )
    requests = RandomRequests(model.vocab_size, seed=6)
    warm_up(engine, requests, config.prompt, texts)
    window = mixed_window(engine, requests, mixture, texts, config.mixed_steps, config.warmup)
    steady_rate = steady(engine, requests, round(window.mean_context), texts, config.steps, config.warmup)
    tokens, seconds = drained(engine, requests, mixture, texts)
    return MixedTiming(
        settings=shown_settings(config, engine),
        device=device_name(device.type),
        texts=texts,
        response_lengths=(mixture.shortest, mixture.longest),
        steps=config.mixed_steps,
        joined=window.joined,
        preemptions=window.preemptions,
        mean_context=window.mean_context,
        tokens_per_second=window.tokens / window.seconds,
        steady_tokens_per_second=steady_rate,
        share_of_steady=window.tokens / window.seconds / steady_rate,
        drained_tokens=tokens,
        drained_seconds=seconds,
        drained_tokens_per_second=tokens / seconds,
        drained_share_of_steady=tokens / seconds / steady_rate,
    )


def shown_settings(config: DecodeConfig, engine: DecodingEngine) -> dict[str, Any]:
    """The settings of a measurement, and how the engine took its steps."""
    return {key: getattr(config, key) for key in (*SHOWN, "quantize", "kv_cache")} | {"decode": engine.decode}


@torch.inference_mode()
def forward_rate(module: RecurrentLM, device: torch.device, repeats: int = 5) -> float:
    """Tokens per second of a training step's forward pass: all module calls over one packed batch, without the head.

    12,288 tokens on a GPU and 512 elsewhere, of samples with the lengths of ``bench train``, by the blocks as they have
    been prepared: on a GPU those of training, unless the weights are in 8 bits. Nothing is kept for a backward pass.
    """
    spans = synthetic_spans("anchor", 12_288 if device.type == "cuda" else 512, seed=0)
    lengths, tokens = spans.lengths, int(spans.starts[-1])
    positions_T = torch.arange(tokens) - spans.starts[:-1].repeat_interleave(lengths)
    ids_T = torch.randint(module.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    ids_T, positions_T = ids_T.to(device), positions_T.to(device)
    fused = device.type == "cuda" and why_not_fused(module.config, device.type) is None
    attention = packed_attention(spans, tokens, device, "triton" if fused else pick_backend(device))
    stopwatch = Stopwatch(device)
    module(ids_T, positions_T, attention)
    for _ in range(repeats):
        with stopwatch:
            module(ids_T, positions_T, attention)
    return tokens / statistics.median(stopwatch.milliseconds()) * 1e3


def requests_of(config: DecodeConfig, batch: int, new: int, seed: int) -> list[Request]:
    """A batch of random prompts, no two alike."""
    requests = RandomRequests(preset(config.size).vocab_size, seed)
    return [requests.make(config.prompt, new) for _ in range(batch)]


def step_bytes(model: RandomModel, tokens: int, cache_dtype: torch.dtype) -> int:
    """Bytes that a step reads: each stack at every call of it, keys and values of ``tokens`` tokens, the head."""
    module, config = model.module, model.config
    stacks = {
        name: sum(t.numel() * t.element_size() for t in module.model.stack(name).state_dict().values())
        for name in config.stacks
    }
    weights = sum(stacks[step.stack] for step in plan(config))
    head = module.lm_head.weight
    return weights + head.numel() * head.element_size() + tokens * bytes_per_token(config, cache_dtype)


def copy_rate(device: torch.device, size: int = 2**28, repeats: int = 10) -> float:
    """Bytes per second of a copy on the device, those read and those written."""
    source = torch.ones(size if device.type == "cuda" else size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * source.numel() * 4 / statistics.median(times)


def time_theirs(config: DecodeConfig, theirs: Theirs, batch: int) -> DecodeTiming:
    """The same batch by Transformers."""
    ms = theirs.step_ms([request.turns[0].prefix_ids for request in requests_of(config, batch, new=1, seed=3)])
    return DecodeTiming(
        system="transformers",
        settings={key: getattr(config, key) for key in SHOWN},
        device=device_name(theirs.device.type),
        batch=batch,
        step_ms=ms,
        tokens_per_second=batch / ms * 1e3,
    )


def as_table(timings: Sequence[DecodeTiming]) -> Table:
    """A column for each batch size and system; with Transformers, how many times as fast we are."""
    table = Table("", *(f"{timing.system}\nbatch {timing.batch}" for timing in timings))
    theirs = {timing.batch: timing.step_ms for timing in timings if timing.system == "transformers"}
    times = [theirs[t.batch] / t.step_ms if t.batch in theirs and t.system == "hrm-text" else None for t in timings]
    rows: list[tuple[str, str, list[float | None]]] = [
        ("ms per step, median", "{:,.2f}", [t.step_ms for t in timings]),
        ("  least", "{:,.2f}", [t.step_ms_min for t in timings]),
        ("  most", "{:,.2f}", [t.step_ms_max for t in timings]),
        ("  floor: bytes at the rate of a copy", "{:,.2f}", [t.floor_ms for t in timings]),
        ("tokens/s", "{:,.1f}", [t.tokens_per_second for t in timings]),
        ("  times Transformers'", "{:,.1f}", times),
        ("prompt tokens/s", "{:,.0f}", [t.prompt_tokens_per_second for t in timings]),
        ("  share of the training forward's", "{:.1%}", [t.prompts_share_of_forward for t in timings]),
        ("training forward, tokens/s", "{:,.0f}", [t.forward_tokens_per_second for t in timings]),
        ("seconds to the first tokens", "{:,.1f}", [t.seconds_to_first_token for t in timings]),
        ("peak GiB", "{:,.1f}", [None if t.peak_bytes is None else t.peak_bytes / 2**30 for t in timings]),
    ]
    for name, form, values in rows:
        table.add_row(name, *("-" if value is None else form.format(value) for value in values))
    return table


def mixed_table(timing: MixedTiming) -> Table:
    """A row for each load, and how it compares with the steady batch."""
    shortest, longest = timing.response_lengths
    table = Table(
        f"{timing.texts} texts, responses of {shortest:,} to {longest:,} tokens",
        "tokens/s",
        "share of steady",
    )
    rows = [
        (f"steady: none ends, contexts of {timing.mean_context:,.0f}", timing.steady_tokens_per_second, 1.0),
        (
            f"in flight: {timing.joined} ended and were followed in {timing.steps:,} steps",
            timing.tokens_per_second,
            timing.share_of_steady,
        ),
        (
            f"drained: exactly {timing.texts}, to the last token, {timing.drained_seconds:.1f} s",
            timing.drained_tokens_per_second,
            timing.drained_share_of_steady,
        ),
    ]
    for name, rate, share in rows:
        table.add_row(name, f"{rate:,.1f}", f"{share:.1%}")
    if timing.preemptions:
        table.add_row(f"the cache was too small: {timing.preemptions} texts gave way and were computed again", "", "")
    return table
