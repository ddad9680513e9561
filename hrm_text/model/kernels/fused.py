"""Whole blocks with hand-made passes: the same equations as ``block.Block``, with a fraction of the traffic and memory.

``fuse`` replaces the forward of a model's stacks and blocks from outside; the modules, their parameters and their names
stay. A fused block is one autograd function that decides itself what it keeps for the backward pass, so that memory is
a setting:

* ``none``: every operand of a backward product is kept.
* ``some``: the SwiGLU's output is made again on the way through its own backward pass, and in a quarter of the layers
  (a fifth with FP8 products, which keep less) the gate-up product is computed again.
* ``full``: a block keeps its input alone and runs forward a second time.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention
from hrm_text.model.block import Block, Stack
from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels import elementwise, float8_passes, passes, why_not
from hrm_text.model.kernels.float8 import MULTIPLE
from hrm_text.model.kernels.float8_passes import Matrices
from hrm_text.model.kernels.passes import Settings, Weights
from hrm_text.model.kernels.tiles import PackedTiles
from hrm_text.model.kernels.triton_attention import TritonAttention
from hrm_text.model.recurrence import RecurrentLM

Recompute = Literal["none", "some", "full"]

# T packed tokens, D width


class FusedBlock(torch.autograd.Function):
    """One block, forward and backward. The weights are inputs so that a backward pass knows that it is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        cos: Tensor,
        sin: Tensor,
        tiles: PackedTiles,
        settings: Settings,
        matrices: Matrices | None,
        *matrices_of_block: Tensor,
    ) -> Tensor:
        weights = Weights(*matrices_of_block)
        out_TD, kept = run_forward(x_TD, weights, matrices, (cos, sin), tiles, settings)
        ctx.weights, ctx.matrices, ctx.tiles, ctx.settings = weights, matrices, tiles, settings
        ctx.save_for_backward(cos, sin, *((x_TD,) if settings.keep_input_only else kept))
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *tensors = ctx.saved_tensors
        weights, matrices, tiles, settings = ctx.weights, ctx.matrices, ctx.tiles, ctx.settings
        if settings.keep_input_only:
            tensors = run_forward(tensors[0], weights, matrices, (cos, sin), tiles, settings)[1]
        dout_TD, needs_x = gradients[0].contiguous(), ctx.needs_input_grad[0]
        if matrices is None:
            kept = passes.Kept(*tensors)
            dx_TD = passes.backward(dout_TD, kept, weights, (cos, sin), tiles, settings, needs_x)
        else:
            kept8 = float8_passes.Kept(*tensors)
            dx_TD = float8_passes.backward(dout_TD, kept8, weights, matrices, (cos, sin), tiles, settings, needs_x)
        return (dx_TD, *[None] * 9)


def run_forward(
    x_TD: Tensor,
    weights: Weights,
    matrices: Matrices | None,
    rotary: tuple[Tensor, Tensor],
    tiles: PackedTiles,
    settings: Settings,
) -> tuple[Tensor, passes.Kept | float8_passes.Kept]:
    """A block's forward pass, in FP8 where there are FP8 matrices."""
    if matrices is None:
        return passes.forward(x_TD, weights, rotary, tiles, settings)
    return float8_passes.forward(x_TD, weights, matrices, rotary, tiles, settings)


class FusedNorm(torch.autograd.Function):
    """RMSNorm without a gain."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, eps: float) -> Tensor:
        y_TD, rstd_T, _ = elementwise.rms_norm(x_TD, eps)
        ctx.save_for_backward(y_TD, rstd_T)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return elementwise.rms_norm_gradient(gradients[0].contiguous(), *ctx.saved_tensors), None


# ---------------------------------------------------------------------------------------------------------- modules ---


def why_not_fused(config: ModelConfig, device: torch.device) -> str | None:
    """Why a model cannot be fused on a device, in words; None: it can."""
    if (lack := why_not("triton", device)) is not None:
        return lack
    if config.norm == "post":
        return "the model has norm: post"
    if config.head_dim & (config.head_dim - 1) or not 16 <= config.head_dim <= 256:
        return f"head_dim must be a power of 2 from 16 to 256, and is {config.head_dim}"
    return None


def why_not_float8(config: ModelConfig, device: torch.device) -> str | None:
    """Why a device or a model cannot have FP8 products, in words; None: it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"FP8 products need an NVIDIA GPU, and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"FP8 products need compute capability 8.9 (Ada, Hopper and later); {name} has less"
    odd = [size for size in (config.hidden_size, config.attention_size, config.intermediate_size) if size % MULTIPLE]
    return f"FP8 products need widths that are multiples of {MULTIPLE}, and the model has {odd[0]}" if odd else None


def fuse(model: RecurrentLM, *, recompute: Recompute = "some", fp8: bool = False) -> None:
    """Replace the forward of every stack and block of a model that lies on its device.

    The blocks fall back to their own forward for any attention but ``TritonAttention``, such as a key-value cache.
    Gradients of the four matrices of a block are added to their ``grad`` by the backward pass itself, so
    ``torch.autograd.grad`` does not see them.
    Raises UserError when ``why_not_fused`` or ``why_not_float8`` has a reason.
    """
    device = model.lm_head.weight.device
    if (reason := why_not_fused(model.config, device)) is not None:
        raise UserError(f"blocks cannot be fused: {reason}; choose blocks compiled or plain")
    if fp8 and (reason := why_not_float8(model.config, device)) is not None:
        raise UserError(reason)
    for name in model.config.stacks:
        stack = model.model.stack(name)
        stack.forward = functools.partial(stack_forward, stack)  # type: ignore[method-assign]
        for index, block in enumerate(stack.layers):
            assert isinstance(block, Block)
            settings = Settings(
                num_heads=model.config.num_heads,
                head_dim=model.config.head_dim,
                eps=model.config.norm_eps,
                keep_gate_up=recompute == "none" or (recompute == "some" and index % (5 if fp8 else 4) != 2),
                keep_h=recompute == "none",
                keep_input_only=recompute == "full",
            )
            matrices = Matrices(weights_of(block)) if fp8 else None
            block.forward = functools.partial(block_forward, block, settings, matrices)  # type: ignore[method-assign]


def stack_forward(
    stack: Stack, x_TD: Tensor, rotary: tuple[Tensor, Tensor], attention: Attention, first_slot: int
) -> Tensor:
    """``Stack.forward`` with its norm in one pass."""
    if not isinstance(attention, TritonAttention) or not len(x_TD):
        return Stack.forward(stack, x_TD, rotary, attention, first_slot)
    for index, call in enumerate(stack.calls()):
        x_TD = call(x_TD, rotary, attention, first_slot + index)
    out_TD: Tensor = FusedNorm.apply(x_TD, stack.eps) if stack.magic else x_TD
    return out_TD


def block_forward(
    block: Block,
    settings: Settings,
    matrices: Matrices | None,
    x_TD: Tensor,
    rotary: tuple[Tensor, Tensor],
    attention: Attention,
    slot: int,
) -> Tensor:
    """``Block.forward`` in one autograd function."""
    if not isinstance(attention, TritonAttention) or not len(x_TD):
        return Block.forward(block, x_TD, rotary, attention, slot)
    weights = weights_of(block)
    if matrices is not None:
        matrices.follow(weights)
    cos, sin = (table.view(len(table), -1) for table in rotary)
    if attention.store is not None:
        out_TD, kept = passes.forward(x_TD, weights, (cos, sin), attention.tiles, settings)
        _, _, k_TNH, v_TNH = passes.heads(kept.gqkv_T4A, settings)
        attention.store(slot, k_TNH, v_TNH)
        return out_TD
    out_TD = FusedBlock.apply(x_TD, cos, sin, attention.tiles, settings, matrices, *weights)
    return out_TD


def weights_of(block: Block) -> Weights:
    """The four matrices of a block."""
    return Weights(
        block.attn.gqkv_proj.weight, block.attn.o_proj.weight, block.mlp.gate_up_proj.weight, block.mlp.down_proj.weight
    )
