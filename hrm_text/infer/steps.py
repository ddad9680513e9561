"""Which way of computing prompts and of taking a step a device and a model have."""

from __future__ import annotations

import torch

from hrm_text.infer.lane import PlainStep, Step
from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.recurrence import RecurrentLM

WORTH_COMPILING = 50_000_000
"""Weights read for a token from which a CPU has compiled loops, which take seconds to compile or to load."""


def prepare(model: RecurrentLM) -> None:
    """Let a model that lies on its device compute prompts, and on a CPU steps, as fast as it can there."""
    device = model.lm_head.weight.device
    if device.type == "cuda" and all(weight.dtype != torch.int8 for weight in model.state_dict().values()):
        from hrm_text.model.kernels.fused import fuse, why_not_fused

        if why_not_fused(model.config, device) is None:
            fuse(model, recompute="full")
    elif is_worth_compiling(model):
        from hrm_text.model.kernels.cpu_decode import speed_up_decoding

        speed_up_decoding(model)


def make_step(model: RecurrentLM, config: ModelConfig, cache: PagedKeyValues, max_batch: int) -> Step:
    """The fastest step there is for a model that has been prepared."""
    device = model.lm_head.weight.device
    if device.type == "cuda":
        from hrm_text.model.kernels.decode import why_not_decode

        if why_not_decode(config, device) is None:
            from hrm_text.infer.graphs import GraphedStep

            return GraphedStep(model, config, cache, max_batch)
    if is_worth_compiling(model):
        from hrm_text.model.kernels.cpu_decode import CompiledDecoding

        return PlainStep(model, config, cache, CompiledDecoding)
    return PlainStep(model, config, cache)


def is_worth_compiling(model: RecurrentLM) -> bool:
    """Whether a model lies on a CPU and is large."""
    config = model.config
    large = config.num_cache_slots * config.block_parameters >= WORTH_COMPILING
    return large and model.lm_head.weight.device.type == "cpu"
