"""Which way of computing prompts and of taking a step a device and a model have."""

from __future__ import annotations

import torch

from hrm_text.contracts import UserError
from hrm_text.infer.lane import PlainStep, Step
from hrm_text.infer.prefill import Recorded
from hrm_text.infer.requests import Decode
from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.recurrence import RecurrentLM

WORTH_COMPILING = 50_000_000
"""Weights read for a token from which a CPU has compiled loops, which take seconds to compile or to load."""


def prepare(model: RecurrentLM, decode: Decode) -> Decode:
    """Let a model compute prompts and steps as asked, from outside; what ``auto`` stands for where it lies.

    Raises:
        UserError: the device or the model does not have what was asked for.
    """
    device = model.lm_head.weight.device
    chosen = automatic(model, device) if decode == "auto" else decode
    if (reason := why_not(chosen, model.config, device)) is not None:
        raise UserError(f"decode: {chosen!r} is not to be had here: {reason}; choose auto or plain")
    if chosen == "compiled":
        from hrm_text.model.kernels.cpu_decode import speed_up_decoding

        speed_up_decoding(model)
    if device.type == "cuda" and all(weight.dtype != torch.int8 for weight in model.state_dict().values()):
        from hrm_text.model.kernels.fused import fuse, why_not_fused

        if why_not_fused(model.config, device) is None:
            fuse(model, recompute="full")
    return chosen


def automatic(model: RecurrentLM, device: torch.device) -> Decode:
    """The fastest way that is known to be right."""
    config = model.config
    if why_not("fused", config, device) is None:
        return "fused"
    large = config.num_cache_slots * config.block_parameters >= WORTH_COMPILING
    return "compiled" if large and why_not("compiled", config, device) is None else "plain"


def why_not(decode: Decode, config: ModelConfig, device: torch.device) -> str | None:
    """What a device or a model lacks for a way of decoding, in words; None: nothing."""
    match decode:
        case "plain":
            return None
        case "compiled":
            from hrm_text.model.kernels import cpu_decode

            return cpu_decode.why_not(config) if device.type == "cpu" else f"it is for CPUs, and this is {device.type}"
        case "fused":
            if device.type != "cuda":
                return f"it needs a GPU with CUDA, and the device is {device.type!r}"
            from hrm_text.model.kernels.decode import why_not_decode

            return why_not_decode(config, device)
        case _:
            raise UserError(f"decode: unknown {decode!r}; choose from auto, plain, compiled, fused")


def make_step(model: RecurrentLM, config: ModelConfig, cache: PagedKeyValues, max_batch: int, decode: Decode) -> Step:
    """A step of a model that has been prepared for it."""
    match decode:
        case "fused":
            from hrm_text.infer.graphs import GraphedStep

            return GraphedStep(model, config, cache, max_batch)
        case "compiled":
            from hrm_text.model.kernels.cpu_decode import CompiledDecoding

            return PlainStep(model, config, cache, CompiledDecoding)
        case _:
            return PlainStep(model, config, cache)


def make_recorded(model: RecurrentLM, cache: PagedKeyValues, decode: Decode) -> Recorded | None:
    """Recorded passes over short prompts, where steps are recorded too."""
    if decode != "fused":
        return None
    from hrm_text.infer.prefill_graphs import GraphedPrefill

    return GraphedPrefill(model, cache)
