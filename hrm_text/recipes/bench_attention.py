"""Times the attention backends against each other, by the lengths of the samples in a batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, PlainAttention, Spans
from hrm_text.model.kernels import available_backends, packed_attention, why_not
from hrm_text.recipes.stopwatch import Stopwatch
from hrm_text.recipes.synthetic import DISTRIBUTIONS, synthetic_spans

# T packed tokens, N heads, H head width

WARM_UP = 3
"""Steps before the clock starts; kernels compile in the first."""

INPUT_SETS = 3
"""Steps take turns over so many inputs, so that none finds its own in the cache."""

CHECKED_TOKENS = 1024
"""Tokens of the batch on which a backend is compared with the definition, which makes all T x T scores."""

HEAD_START_BYTES = 2**30
"""Written on a GPU before each timed call: the host queues the call meanwhile, so that its launches are not timed."""


@dataclass(frozen=True)
class AttentionTiming:
    """One backend on batches of one distribution; times are medians."""

    backend: str
    distribution: str
    samples: int
    tokens: int
    """Of the batch, padding included."""
    visible_pairs: int
    """(query, key) pairs of one head that the mask lets through."""
    prepare_ms: float
    """On the host, once a batch: index tensors, block mask, tiles."""
    forward_ms: float
    backward_ms: float
    forward_tflops: float
    """TFLOP/s; only visible pairs count, 4 x head width x heads operations each."""
    peak_mib: float | None
    """Most memory of a forward and backward pass beyond its inputs, its result included; null where unknown."""
    relative_error: float
    """Largest error of the output and the three gradients, as a share of the largest value, against the definition in
    fp32 on the same inputs."""


def bench_attention(
    backends: Sequence[str] | None = None,
    distributions: Sequence[str] | None = None,
    *,
    num_tokens: int = 12_288,
    heads: int = 12,
    head_dim: int = 128,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    steps: int = 20,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[AttentionTiming]:
    """Forward and backward time of each backend on each distribution.

    Args:
        backends: all that run here but plain, whose T x T scores fit few GPUs, if not given
        distributions: of ``recipes.synthetic``; all if not given
        num_tokens: of a batch
        heads: attention heads
        head_dim: width of a head
        dtype: bfloat16 on CUDA and fp32 elsewhere if not given
        device: CUDA, MPS or the CPU, the first there is, if not given
        steps: timed calls
        seed: of the lengths and the inputs
        on_progress: is told how many of all combinations are done

    Raises:
        UserError: a backend cannot run here, or there is no such distribution.
    """
    device = device or best_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    backends = backends or [name for name in available_backends(device, dtype) if name != "plain"]
    for backend in backends:
        if lack := why_not(backend, device, dtype):
            able = ", ".join(available_backends(device, dtype))
            raise UserError(f"attention: {backend!r} is not to be had here: {lack}; choose from {able}")
    batches = {name: synthetic_spans(name, num_tokens, seed) for name in distributions or DISTRIBUTIONS}
    inputs = [random_inputs(num_tokens, heads, head_dim, dtype, device, seed + i) for i in range(INPUT_SETS)]
    timings: list[AttentionTiming] = []
    for distribution, spans in batches.items():
        for backend in backends:
            if on_progress:
                on_progress(len(timings), len(batches) * len(backends))
            pairs = visible_pairs(spans)
            prepare_ms, attention = prepare(spans, num_tokens, device, backend)
            forward_ms, backward_ms, peak_mib = time_passes(attention, inputs, steps)
            checked = synthetic_spans(distribution, min(num_tokens, CHECKED_TOKENS), seed)
            timings.append(
                AttentionTiming(
                    backend,
                    distribution,
                    samples=len(spans.lengths),
                    tokens=num_tokens,
                    visible_pairs=pairs,
                    prepare_ms=prepare_ms,
                    forward_ms=forward_ms,
                    backward_ms=backward_ms,
                    forward_tflops=4 * head_dim * heads * pairs / forward_ms / 1e9,
                    peak_mib=peak_mib,
                    relative_error=relative_error(backend, checked, min(num_tokens, CHECKED_TOKENS), inputs[0]),
                )
            )
    if on_progress:
        on_progress(len(timings), len(timings))
    return timings


def best_device() -> torch.device:
    """CUDA, MPS or the CPU, the first there is."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def visible_pairs(spans: Spans) -> int:
    """(query, key) pairs that the mask lets through: prefix squared, and what response tokens see, row by row."""
    length, prefix = spans.lengths, spans.prefix_lengths
    return int((prefix * prefix + (length * (length + 1) - prefix * (prefix + 1)) // 2).sum())


@dataclass(frozen=True)
class Inputs:
    """Views into [T, 4, N, H] (gate, q, k, v), as a block's first product gives them, and the output's gradient."""

    qkv: list[Tensor]
    gradient_TNH: Tensor


def random_inputs(
    num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    """Normally distributed ones."""
    generator = torch.Generator(device).manual_seed(seed)
    gqkv_T4NH = torch.randn(num_tokens, 4, heads, head_dim, dtype=dtype, device=device, generator=generator)
    gradient_TNH = torch.randn(num_tokens, heads, head_dim, dtype=dtype, device=device, generator=generator)
    return Inputs([x_TNH.detach().requires_grad_() for x_TNH in gqkv_T4NH.unbind(1)[1:]], gradient_TNH)


def prepare(spans: Spans, num_tokens: int, device: torch.device, backend: str) -> tuple[float, Attention]:
    """Least milliseconds on the host that it takes to get a batch ready, and the batch's attention."""
    times = []
    for _ in range(WARM_UP):
        start = time.perf_counter()
        attention = packed_attention(spans, num_tokens, device, backend)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times), attention


def time_passes(attention: Attention, inputs: Sequence[Inputs], steps: int) -> tuple[float, float, float | None]:
    """Median milliseconds of a forward and of a backward pass, and the most memory in MiB that both took."""
    device = inputs[0].gradient_TNH.device
    on_cuda = device.type == "cuda"
    head_start = torch.empty(HEAD_START_BYTES if on_cuda else 0, dtype=torch.int8, device=device)
    stopwatch = Stopwatch(device)
    before, peak_mib = 0, None
    for step in range(WARM_UP + steps):
        qkv, gradient_TNH = inputs[step % len(inputs)].qkv, inputs[step % len(inputs)].gradient_TNH
        if step == WARM_UP:
            stopwatch = Stopwatch(device)
            if on_cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
        head_start.zero_()
        with stopwatch:
            y_TNH = attention(qkv[0], qkv[1], qkv[2], 0)
        head_start.zero_()
        with stopwatch:
            gradients = torch.autograd.grad(y_TNH, qkv, gradient_TNH)
        del y_TNH, gradients
    times = stopwatch.milliseconds()
    if on_cuda:
        peak_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return statistics.median(times[::2]), statistics.median(times[1::2]), peak_mib


def relative_error(backend: str, spans: Spans, num_tokens: int, inputs: Inputs) -> float:
    """Largest error of output and gradients on the first ``num_tokens`` inputs, as a share of the largest value."""

    def outcome(attention: Attention, dtype: torch.dtype) -> list[Tensor]:
        qkv = [x_TNH[:num_tokens].detach().to(dtype).requires_grad_() for x_TNH in inputs.qkv]
        y_TNH = attention(qkv[0], qkv[1], qkv[2], 0)
        gradients = torch.autograd.grad(y_TNH, qkv, inputs.gradient_TNH[:num_tokens].to(dtype))
        return [x_TNH.detach().float() for x_TNH in (y_TNH, *gradients)]

    device = inputs.gradient_TNH.device
    found = outcome(packed_attention(spans, num_tokens, device, backend), inputs.gradient_TNH.dtype)
    expected = outcome(PlainAttention(spans, num_tokens, device), torch.float32)
    return max(
        float((x_TNH - oracle_TNH).abs().max() / oracle_TNH.abs().max())
        for x_TNH, oracle_TNH in zip(found, expected, strict=True)
    )


def show(timings: Sequence[AttentionTiming], console: Console) -> None:
    """The table, the fastest of each distribution first; it fits 80 columns."""
    table = Table(title=f"attention, {timings[0].tokens:,} tokens" if timings else "attention", box=SIMPLE_HEAD)
    for column in ("samples", "backend"):
        table.add_column(column, no_wrap=True)
    for column in ("prepare\nms", "forward\nms", "backward\nms", "forward\nTFLOP/s", "peak\nMiB", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    by_distribution: dict[str, list[AttentionTiming]] = {}
    for timing in timings:
        by_distribution.setdefault(timing.distribution, []).append(timing)
    for distribution, rows in by_distribution.items():
        for place, row in enumerate(sorted(rows, key=lambda row: row.forward_ms + row.backward_ms)):
            table.add_row(
                f"{row.samples:,} {distribution}" if place == 0 else "",
                row.backend,
                f"{row.prepare_ms:.1f}",
                f"{row.forward_ms:.3f}",
                f"{row.backward_ms:.3f}",
                f"{row.forward_tflops:.2f}",
                "-" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
                f"{row.relative_error:.1e}",
                style="bold" if place == 0 else "",
            )
        table.add_section()
    console.print(table)
