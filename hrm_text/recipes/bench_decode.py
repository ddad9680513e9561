"""How fast a machine answers: the engine on random weights and prompts, beside Transformers if asked."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

from hrm_text.contracts import UserError
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.memory import bytes_per_token
from hrm_text.infer.requests import Decode, Request, Sampling, Turn
from hrm_text.model.config import Architecture, ModelConfig, preset
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.model.weights import parse_dtype, write_weights
from hrm_text.settings import from_mapping, settings, to_mapping
from hrm_text.train.config import Count
from hrm_text.train.execution import available_device, device_name
from hrm_text.train.metrics import device_memory_bytes

SHOWN = ("size", "architecture", "prompt", "dtype")

SPECIAL_IDS = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}


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
    step_ms_min: float | None
    step_ms_max: float | None
    tokens_per_second: float
    """Of the whole batch."""
    floor_ms: float | None
    """Bytes that a step must read (weights at every call, keys and values, head) at the rate of a device copy."""
    prefill_ms: float | None
    """All prompts into the cache, up to the first token."""
    prompt_tokens_per_second: float | None
    seconds_to_first_token: float | None
    """From weights in memory to the second token of the first batch: cache, kernels, recordings, prompts, a step."""
    peak_bytes: int | None


class RandomText:
    """A format without a tokenizer: nothing ends a response, and no token has a text."""

    eoa_id = -1

    def decode(self, ids: Sequence[int]) -> str:
        """Nothing."""
        return ""


@dataclass(frozen=True)
class RandomModel:
    """What an engine needs of a model, with random weights and no tokenizer."""

    module: RecurrentLM
    prompt_format: RandomText

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.module.config

    @property
    def vocab_size(self) -> int:
        """All entries."""
        return self.config.vocab_size


def bench_decode(config: DecodeConfig, batches: Sequence[int], vs: str | None = None) -> list[DecodeTiming]:
    """Time steady decoding at each batch size; ``vs`` "transformers": the same weights there as well, size by size.

    Raises:
        UserError: a batch below 1, an unknown system, a device that is not there, too little memory.
    """
    if bad := [batch for batch in batches if batch < 1]:
        raise UserError(f"batch: expected at least 1, found {bad[0]}")
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
            timings.append(theirs.time(config, batch))
    return timings


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
    before = time.perf_counter()
    list(engine_steps(engine, requests_of(config, batch, new=1, seed=2)))  # the prompts' pass makes the first token
    prefill_ms = 1e3 * (time.perf_counter() - before)
    steps = engine_steps(engine, requests_of(config, batch, new=new, seed=3))
    at = [time.perf_counter() for _ in steps][config.warmup :]
    ms = [1e3 * (after - earlier) for earlier, after in itertools.pairwise(at)][: config.steps]
    median = statistics.median(ms)
    tokens = config.prompt + config.warmup + config.steps // 2
    return DecodeTiming(
        system="hrm-text",
        settings={key: getattr(config, key) for key in (*SHOWN, "quantize", "kv_cache")} | {"decode": engine.decode},
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


def requests_of(config: DecodeConfig, batch: int, new: int, seed: int) -> list[Request]:
    """A batch of random prompts, no two alike."""
    rng = np.random.Generator(np.random.Philox(seed))
    ids = rng.integers(100, preset(config.size).vocab_size, (batch, config.prompt)).tolist()
    return [Request((Turn(tuple(row)),), new, Sampling()) for row in ids]


def engine_steps(engine: DecodingEngine, requests: Sequence[Request]) -> Iterator[int]:
    """Run requests to their end; after each step, the tokens made since the beginning."""
    before = engine.status.generated_tokens_total
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        engine.step()
        yield engine.status.generated_tokens_total - before


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


class Theirs:
    """Transformers' model of the same weights."""

    def __init__(self, module: RecurrentLM, dtype: torch.dtype, device: torch.device) -> None:
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils.logging import disable_progress_bar
        except ImportError:
            raise UserError('--vs transformers needs the extra hf: pip install "hrm-text[hf]"') from None
        with tempfile.TemporaryDirectory() as folder:
            write_weights(Path(folder), module.config, module.state_dict(), dtype, SPECIAL_IDS)
            disable_progress_bar()
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.device = device

    def time(self, config: DecodeConfig, batch: int, few: int = 2, many: int = 10) -> DecodeTiming:
        """A batch's step: what ``many`` new tokens take longer than ``few``, divided by how many more they are."""
        rows = [request.turns[0].prefix_ids for request in requests_of(config, batch, new=1, seed=3)]
        ids = torch.tensor(rows, device=self.device)
        seconds: dict[int, list[float]] = {few: [], many: []}
        for _ in range(4):
            for count, times in seconds.items():
                times.append(self._seconds(ids, count))
        ms = 1e3 * (min(seconds[many][1:]) - min(seconds[few][1:])) / (many - few)
        return DecodeTiming(
            system="transformers",
            settings={key: getattr(config, key) for key in SHOWN},
            device=device_name(self.device.type),
            batch=batch,
            step_ms=ms,
            step_ms_min=None,
            step_ms_max=None,
            tokens_per_second=batch / ms * 1e3,
            floor_ms=None,
            prefill_ms=None,
            prompt_tokens_per_second=None,
            seconds_to_first_token=None,
            peak_bytes=None,
        )

    @torch.inference_mode()
    def _seconds(self, ids: torch.Tensor, count: int) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


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
        ("seconds to the first tokens", "{:,.1f}", [t.seconds_to_first_token for t in timings]),
        ("peak GiB", "{:,.1f}", [None if t.peak_bytes is None else t.peak_bytes / 2**30 for t in timings]),
    ]
    for name, form, values in rows:
        table.add_row(name, *("-" if value is None else form.format(value) for value in values))
    return table
