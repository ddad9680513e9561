"""`hrm-text bench`: how fast this machine is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import arg

from hrm_text.cli.terminal import notes, print_json, progress_bar
from hrm_text.contracts import UserError


def train(
    size: str = "XL",
    architecture: str = "hrm",
    tokens: int = 12_288,
    k: int | None = None,
    steps: int = 10,
    warmup: int = 3,
    distribution: str = "anchor",
    blocks: str = "auto",
    attention: str = "auto",
    recompute: str = "auto",
    fp8: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    micro_batches: int = 1,
    sharding: str = "auto",
    shard_ranks: int | None = None,
    compare: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = (),
    parts: bool = False,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Time training steps on random weights and random samples: tokens/s, memory, MFU, time to the first step.

    Of several GPUs: torchrun --nproc-per-node 2 -m hrm_text bench train ... --compare sharding=none

    Args:
        size: named size of the model
        architecture: plan of module calls
        tokens: token budget of a step
        k: module calls that carry gradient; the architecture's own number if not given
        steps: timed steps
        warmup: steps before the clock starts
        distribution: lengths of the samples: anchor, short, mixed, long or causal
        blocks: auto, plain, compiled or fused
        attention: auto, plain, grouped, varlen, flex, flash or triton
        recompute: auto, none, some or full
        fp8: matrix products of the blocks in FP8
        dtype: auto, float32 or bfloat16
        device: auto, cpu, cuda or mps
        micro_batches: micro-batches that each rank takes in a step
        sharding: with torchrun, what ranks share: auto, ddp, fsdp, hsdp; none: they exchange nothing
        shard_ranks: hsdp, ranks that share one copy
        compare: settings in which a second configuration differs; the two take turns, step by step
        parts: profile one more step: milliseconds by part (CUDA)
        json: print one JSON object per configuration
    """
    from hrm_text.recipes.bench_train import BenchConfig, as_table, bench_train
    from hrm_text.settings import from_mapping

    values = {
        "size": size,
        "architecture": architecture,
        "tokens": tokens,
        "k": k,
        "distribution": distribution,
        "blocks": blocks,
        "attention": attention,
        "recompute": recompute,
        "fp8": fp8,
        "dtype": dtype,
        "device": device,
        "micro_batches": micro_batches,
        "sharding": sharding,
        "shard_ranks": shard_ranks,
    }
    config = from_mapping(BenchConfig, values, "bench train")
    with notes().status("timing training steps"):
        timings = bench_train(config, compare, steps=steps, warmup=warmup, parts=parts)
    if json:
        for timing in timings:
            print_json(dataclasses.asdict(timing))
    elif timings:  # of the ranks of torchrun, one
        Console().print(as_table(timings))


def decode(
    size: str = "XL",
    architecture: str = "hrm",
    batch: str = "1,16,64",
    prompt: int = 256,
    steps: int = 64,
    warmup: int = 8,
    quantize: Literal["none", "int8"] = "none",
    kv_cache: Literal["auto", "int8"] = "auto",
    decode: Literal["auto", "plain", "compiled", "fused"] = "auto",
    dtype: str = "auto",
    device: str = "auto",
    vs: Literal["transformers"] | None = None,
    mixed: int | None = None,
    mixed_steps: int = 2000,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Time the engine on random weights and prompts: ms per step, tokens/s, prompts, time to the first token.

    Prompts are also given as a share of a training step's forward pass, which is timed in the same run.

    Args:
        size: named size of the model
        architecture: plan of module calls
        batch: texts made together: numbers with commas between, each measured
        prompt: tokens of each prompt
        steps: timed steps
        warmup: steps before the clock starts
        quantize: int8 keeps the weights of the blocks in 8 bits
        kv_cache: int8 keeps keys and values in 8 bits
        decode: how steps are computed: auto, plain, compiled (CPU), fused (CUDA)
        dtype: auto, float32 or bfloat16
        device: auto, cpu, cuda or mps
        vs: transformers answers the same prompts with the same weights
        mixed: texts in flight, of different lengths, each followed by another as it ends: the share of a steady batch's
            tokens/s that they reach, prompts included; not measured if not given
        mixed_steps: steps over which these are measured
        json: print one JSON object per batch and system
    """
    from hrm_text.recipes.bench_decode import DecodeConfig, as_table, bench_decode, mixed_table
    from hrm_text.settings import from_mapping

    values = {
        "size": size,
        "architecture": architecture,
        "prompt": prompt,
        "steps": steps,
        "warmup": warmup,
        "mixed_steps": mixed_steps,
        "quantize": quantize,
        "kv_cache": kv_cache,
        "decode": decode,
        "dtype": dtype,
        "device": device,
    }
    config = from_mapping(DecodeConfig, values, "bench decode")
    try:
        batches = [int(number) for number in batch.split(",")]
    except ValueError:
        raise UserError(f"--batch: expected numbers with commas between, such as 1,16,64, found {batch!r}") from None
    with notes().status("timing decoding steps"):
        timings, come_and_go = bench_decode(config, batches, vs, mixed)
    if json:
        for timing in timings:
            print_json(dataclasses.asdict(timing))
        if come_and_go is not None:
            print_json(dataclasses.asdict(come_and_go))
        return
    Console().print(as_table(timings))
    if come_and_go is not None:
        Console().print(mixed_table(come_and_go))


def attention(
    tokens: int = 12_288,
    heads: int = 12,
    head_dim: int = 128,
    backends: tuple[str, ...] = (),
    distributions: tuple[str, ...] = (),
    steps: int = 20,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Time the attention backends on samples of several length distributions, and compare them with the definition.

    Args:
        tokens: tokens of a batch
        heads: attention heads
        head_dim: width of a head
        backends: some of plain, grouped, varlen, flex, flash, triton; all that run here but plain if not given
        distributions: some of anchor, short, mixed, long, causal; all if not given
        steps: timed calls
        dtype: auto is bfloat16 on CUDA and float32 elsewhere
        device: auto is CUDA where there is one, then MPS, then the CPU
        json: print one JSON object per backend and distribution
    """
    import torch

    from hrm_text.model.weights import parse_dtype
    from hrm_text.recipes.bench_attention import bench_attention, show
    from hrm_text.train.execution import available_device

    with progress_bar("timing", "cases") as on_progress:
        timings = bench_attention(
            backends or None,
            distributions or None,
            num_tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            dtype=None if dtype == "auto" else parse_dtype(dtype),
            device=torch.device(available_device(device)),
            steps=steps,
            on_progress=on_progress,
        )
    if json:
        for timing in timings:
            print_json(dataclasses.asdict(timing))
    else:
        show(timings, Console())


def data(
    records: tuple[Path, ...] = (),
    tokenizer: Path | None = None,
    samples: int = 1_000_000,
    tokens: int = 12_288,
    ranks: int = 16,
    workers: tuple[int, ...] = (0, 2),
    seconds: float = 5.0,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Time tokenising, the plan of an epoch and loading on this machine's processor.

    Args:
        records: files or folders of records to tokenise; generated ones if not given
        tokenizer: folder of the tokenizer; one trained on the records if not given
        samples: of the synthetic epoch that is planned and loaded
        tokens: token budget of a batch
        ranks: for which the plan is made
        workers: threads of the loader, each number measured; 0 is the caller's own
        seconds: how long each loader runs
        json: print one JSON object
    """
    from hrm_text.recipes.bench_data import bench_data, show

    with notes().status("timing the data pipeline"):
        timings = bench_data(
            records, tokenizer, samples=samples, tokens_per_batch=tokens, ranks=ranks, workers=workers, seconds=seconds
        )
    if json:
        print_json(dataclasses.asdict(timings) | {"share": timings.tokenize.share})
    else:
        show(timings, Console())


COMMANDS: dict[str, Callable[..., None]] = {"train": train, "decode": decode, "attention": attention, "data": data}
