"""How a training step is computed: device, dtype, kernels and what is kept for the backward pass.

The blocks of the model know nothing of it: they are compiled, fused and checkpointed from here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, Spans
from hrm_text.model.block import Block
from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels import available_backends, packed_attention, pick_backend, why_not
from hrm_text.model.recurrence import RecurrentLM
from hrm_text.model.weights import parse_dtype
from hrm_text.train.config import AttentionBackend, ExecutionConfig

Config = TypeVar("Config", bound=ExecutionConfig)


def chosen(config: Config, model: ModelConfig) -> Config:
    """The settings with every "auto" replaced by what is best for this model on this machine.

    Raises UserError when what is asked for is not there, or cannot be had together.
    """
    device = available_device(config.device)
    on_cuda = device == "cuda"
    nvidia = on_cuda and torch.version.hip is None  # AMD's GPUs take the portable path: nobody has run the others there
    blocks = config.blocks
    if blocks == "auto":
        fusible = nvidia and config.attention in ("auto", "triton") and why_not_fused(model, device) is None
        blocks = "fused" if fusible else "compiled" if nvidia else "plain"
    elif blocks == "fused" and (reason := why_not_fused(model, device)) is not None:
        raise UserError(f"blocks: the blocks cannot be fused here: {reason}; leave blocks at auto")
    fused = blocks == "fused"
    attention = config.attention
    if attention == "auto":
        attention = "triton" if fused else cast(AttentionBackend, pick_backend(torch.device(device)))
    recompute = config.recompute
    if recompute == "auto":
        recompute = "some" if fused else "none"
    if fused and attention != "triton":
        raise UserError(
            f"attention: fused blocks need triton, found {attention!r}; leave attention at auto, or take other blocks"
        )
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if on_cuda else "float32"
    if lack := why_not(attention, torch.device(device), parse_dtype(dtype)):
        choices = ", ".join(available_backends(torch.device(device), parse_dtype(dtype)))
        raise UserError(f"attention: {attention!r} is not to be had here: {lack}; choose from {choices}")
    if recompute == "some" and not fused:
        raise UserError(f"recompute: {blocks} blocks know none and full; 'some' needs fused blocks")
    if config.fp8 and not fused:
        raise UserError(f"fp8: products in FP8 need fused blocks, and these are {blocks}")
    if config.fp8 and dtype != "bfloat16":
        raise UserError(f"fp8: products in FP8 go with dtype bfloat16, found {dtype!r}; leave dtype at auto")
    if config.fp8:
        from hrm_text.model.kernels.fused import why_not_float8

        if (reason := why_not_float8(model, torch.device(device))) is not None:
            raise UserError(f"fp8: {reason}; leave fp8 at false")
    return dataclasses.replace(
        config, device=device, dtype=dtype, blocks=blocks, attention=attention, recompute=recompute
    )


def available_device(name: Literal["auto", "cpu", "cuda", "mps"]) -> Literal["cpu", "cuda", "mps"]:
    """The device of that name; one that is not there is an error that lists those that are."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise UserError(f"device: {name!r} is not available here; choose from {[d for d in available if available[d]]}")
    return name


def why_not_fused(model: ModelConfig, device: str) -> str | None:
    """The reason for which the blocks of a model cannot be fused on a device, None where they can."""
    try:
        from hrm_text.model.kernels import fused
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        return "Triton is not installed"
    reason: str | None = fused.why_not_fused(model, torch.device(device))
    return reason


def describe(config: ExecutionConfig) -> str:
    """Settings in which every choice is made, for people: "NVIDIA H200 (bfloat16, fused blocks, ...)"."""
    fp8 = ", products in FP8" if config.fp8 else ""
    return (
        f"{device_name(config.device)} ({config.dtype}, {config.blocks} blocks, {config.attention} attention, "
        f"recompute {config.recompute}{fp8})"
    )


def device_name(device: str) -> str:
    """What a person calls the device."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads" if device == "cpu" else device


# ------------------------------------------------------------------------------------------- applied from outside --


def prepare_blocks(model: RecurrentLM, config: ExecutionConfig) -> None:
    """Fuse, compile or checkpoint the blocks of a model, as the settings say."""
    assert config.blocks != "auto" and config.recompute != "auto"
    if config.blocks == "fused":
        from hrm_text.model.kernels.fused import fuse

        fuse(model, recompute=config.recompute, fp8=config.fp8)
        return
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        forward = block.forward
        if config.blocks == "compiled":
            # FlexAttention pads every batch to one shape and is compiled with the block. Any other attention stands
            # outside of the graph (see OutsideGraph), and the number of tokens must not compile anything anew.
            forward = torch.compile(forward, dynamic=config.attention != "flex")
        if config.recompute == "full":
            forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward  # type: ignore[method-assign]


def batch_attention(spans: Spans, num_tokens: int, config: ExecutionConfig) -> Attention:
    """The attention of one packed batch, padding included in ``num_tokens``."""
    attention = packed_attention(spans, num_tokens, torch.device(config.device), config.attention)
    return OutsideGraph(attention) if config.blocks == "compiled" and config.attention != "flex" else attention


class OutsideGraph:
    """Attention that compiled blocks call and do not look into: its lengths and its groups change with every batch."""

    def __init__(self, attention: Attention) -> None:
        self.attention, self._attend = attention, ends_a_graph()

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        """Attend within the batch. ``slot`` does not matter: a graph that saw it would be one of its own."""
        return self._attend(self.attention, q_TNH, k_TNH, v_TNH)


@functools.cache
def ends_a_graph() -> Callable[..., Tensor]:
    """``attend`` as the compiler leaves it alone; made when first used, as the compiler takes seconds to import."""
    disabled: Callable[..., Tensor] = torch.compiler.disable(attend)
    return disabled


def attend(attention: Attention, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
    """A call of an attention."""
    return attention(q_TNH, k_TNH, v_TNH, 0)
