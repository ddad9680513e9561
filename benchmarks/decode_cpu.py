"""Decoding on a CPU against Transformers: B-size, random weights, greedy, 256 tokens in the cache.

    python benchmarks/decode_cpu.py [--rounds 5] [--steps 4]

Every round takes a few steps of each contender, one after the other, so that what else the machine does meets them all.
A step is the forward pass, the head and the choice of the likeliest token. The cache is filled with random keys and
values: prompts of 8 x 256 tokens take Transformers two minutes in bf16 on a CPU without bf16 instructions, and steps
do not depend on what the cache holds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hrm_text.model.config import ModelConfig, preset
from hrm_text.model.kernels.cpu_decode import CompiledDecoding, speed_up_decoding
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.quantized import quantize_weights
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.model.weights import config_to_json

TOKENS, PAGE_SIZE, ROOM = 256, 16, 64
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
CONTENDERS = [
    ("Transformers", "float32"),
    ("Transformers", "bfloat16"),
    ("ours", "float32"),
    ("ours", "bfloat16"),
    ("ours", "int8"),
]


def transformers_step(config: ModelConfig, dtype: torch.dtype, model: Any, texts: int) -> Callable[[], None]:
    cache = DynamicCache()
    for slot in range(config.num_cache_slots):
        cache.update(*torch.randn(2, texts, config.num_heads, TOKENS, config.head_dim, dtype=dtype), slot)
    ids = torch.zeros(texts, 1, dtype=torch.long)

    def step() -> None:
        nonlocal ids
        ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return step


def our_step(config: ModelConfig, dtype: torch.dtype, model: RecurrentLM, texts: int) -> Callable[[], None]:
    pages = (TOKENS + ROOM) // PAGE_SIZE
    cache = PagedKeyValues.allocate(config, texts * pages, PAGE_SIZE, torch.device("cpu"), dtype)
    cache.keys.normal_()
    cache.values.normal_()
    table = torch.randperm(texts * pages).view(texts, pages)
    lengths, ids = torch.full((texts,), TOKENS), torch.zeros(texts, dtype=torch.long)

    def step() -> None:
        nonlocal ids, lengths
        lengths = lengths + 1
        ids = model.lm_head(model(ids, lengths - 1, CompiledDecoding(cache, table, lengths))).argmax(-1)

    return step


def models(config: ModelConfig) -> dict[tuple[str, str], Any]:
    special = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    values = config_to_json(config, torch.float32, special)
    found: dict[tuple[str, str], Any] = {}
    for who, name in CONTENDERS:
        dtype = torch.bfloat16 if name == "int8" else getattr(torch, name)
        if who == "Transformers":
            twin = AutoConfig.for_model(**values)
            found[who, name] = AutoModelForCausalLM.from_config(twin, dtype=dtype).eval()
        else:
            model = build(config, dtype=dtype)
            if name == "int8":
                quantize_weights(model)
            speed_up_decoding(model)
            found[who, name] = model
    return found


def bandwidth() -> float:
    """Bytes a second that a sum reads."""
    numbers = torch.ones(1 << 28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


def floor_bytes(config: ModelConfig, name: str, texts: int) -> float:
    """Bytes a step cannot do without: every weight of every call, the head, and the keys and values."""
    cached = 2 if name == "int8" else BYTES[name]
    weights = config.num_cache_slots * config.block_parameters * BYTES[name]
    return (
        weights
        + config.vocab_size * config.hidden_size * cached
        + texts * TOKENS * config.cache_bytes_per_token(cached)
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    assert options.rounds * options.steps + 1 <= ROOM
    config = preset("B")
    found, read = models(config), bandwidth()
    load = f"{os.getloadavg()[0]:.1f}"
    print(
        f"{torch.get_num_threads()} threads, load {load}, memory read at {read / 1e9:.1f} GB/s; {options.rounds} rounds"
    )
    print("texts  who           weights     ms/step  (least - most)   tokens/s  floor ms  against Transformers")
    for texts in (1, 8):
        steps = {}
        for (who, name), model in found.items():
            dtype = torch.bfloat16 if name == "int8" else getattr(torch, name)
            steps[who, name] = (transformers_step if who == "Transformers" else our_step)(config, dtype, model, texts)
            steps[who, name]()
        times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        for _ in range(options.rounds):
            for key, step in steps.items():
                for _ in range(options.steps):
                    start = time.perf_counter()
                    step()
                    times[key].append((time.perf_counter() - start) * 1000)
        for (who, name), ms in times.items():
            middle = median(ms)
            twin = median(times["Transformers", "bfloat16" if name == "int8" else name])
            best = min(median(times["Transformers", other]) for other in ("float32", "bfloat16"))
            against = "" if who == "Transformers" else f"{twin / middle:.2f} x (its best: {best / middle:.2f} x)"
            least = floor_bytes(config, name, texts) / read * 1000
            print(
                f"{texts:5}  {who:12}  {name:8}  {middle:9.1f}  ({min(ms):.1f} - {max(ms):.1f})  "
                f"{1000 * texts / middle:9.1f}  {least:8.1f}  {against}",
                flush=True,
            )


if __name__ == "__main__":
    main()
